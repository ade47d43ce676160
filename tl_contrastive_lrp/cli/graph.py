"""The command ``graph``: the attribution graph of one prediction, pruned, told and written."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as o
from .exit import CliError, exit_codes, not_finite
from .output import Output, write
from .question import Question, ask, check_typed
from .tell import print_json
from .terminal import progress

if TYPE_CHECKING:
    from ..graph import AttributionGraph
    from ..paths import Paths

# A full graph grows with the square of the prompt: at 2,000 tokens it holds two million edges, or
# 32 MB, a block. Above that it is made only when asked for.
REPORT_TOKENS = 2000


@dataclass(frozen=True)
class Pruning:
    """Which edges stay, as ``AttributionGraph.prune`` takes it; and whether only connected ones."""

    mass: float | None = None
    threshold: float | None = None
    relative: float | None = None
    top_k: int | None = None
    connected: bool = True

    def check(self) -> None:
        """Refuse what no option alone can: infinity, and two thresholds.

        Raises:
            typer.BadParameter: either of them.
        """
        for name in ("mass", "threshold", "relative"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise typer.BadParameter(f"--{name} must be a finite number.")
        if self.threshold is not None and self.relative is not None:
            raise typer.BadParameter("Give either --threshold (in logits) or --relative (to |Δℓ|).")

    def of(self, graph: AttributionGraph) -> AttributionGraph:
        """The graph that is left.

        Raises:
            typer.BadParameter: ``relative``, where Δℓ is 0.
        """
        if self.relative is not None and not graph.delta:
            raise typer.BadParameter("Δℓ is 0, so nothing is relative to it: use --threshold.")
        pruned = graph.prune(
            mass=self.mass, threshold=self.threshold, relative=self.relative, top_k=self.top_k
        )
        return pruned.connected() if self.connected else pruned


@dataclass(frozen=True)
class Graphed:
    """A graph, full and pruned, with what was asked.

    paths are those of the full graph: pruning changes no strength.
    """

    question: Question
    full: AttributionGraph
    kept: AttributionGraph
    paths: Paths


def report_graph(
    model: Any, question: Question, rules: str, output: Output
) -> tuple[AttributionGraph | None, str]:
    """The graph for the report of ``explain``: pruned and connected; or None, and why not."""
    from ..errors import UncoveredComponentError

    n = question.n_tokens
    if n > REPORT_TOKENS:
        return None, (
            f"The report has no graph, because the prompt has more than {REPORT_TOKENS:,} tokens "
            f"({n:,}); the graph command makes one."
        )
    try:
        return Pruning().of(_build(model, question, rules, output)), ""
    except (CliError, UncoveredComponentError) as error:
        return None, f"The report has no graph: {error}"
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error).lower():
            raise
        return None, "The report has no graph: there was not enough memory for it."


def _build(
    model: Any, question: Question, rules: str, output: Output, **options: Any
) -> AttributionGraph:
    """The full graph.

    Raises:
        CliError: relevance that is not finite.
    """
    from ..graph_build import attribution_graph

    layers = options.get("layers")
    # Transitions over several blocks show a bar of their own; two moving things would clash.
    bar = layers is not None and output.spins
    with progress(f"Edges between {question.n_tokens} tokens", output.spins and not bar):
        try:
            return attribution_graph(
                model,
                question.tokens,
                target=question.target,
                contrast=question.contrast,
                pos=question.at,
                rules=rules,
                progress=bar,
                **options,
            )
        except ValueError as error:
            if type(error) is ValueError and re.search(r"\b(nan|inf|infinite)\b", str(error), re.I):
                raise not_finite(question.dtype) from error
            raise


def _layers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", text):
        raise typer.BadParameter(f"--layers {text!r}: give block numbers, such as 0,4,8.")
    return [int(number) for number in text.split(",")]


def _check_layers(layers: list[int], blocks: int, heads: bool) -> None:
    chosen = sorted({*layers, blocks})
    if chosen[-1] > blocks or len(chosen) < 2:
        raise typer.BadParameter(
            f"--layers: the model has blocks 0 to {blocks - 1}; the final output ({blocks}) is "
            "always there."
        )
    if heads and chosen != list(range(chosen[0], blocks + 1)):
        raise typer.BadParameter(
            "--heads splits edges within one block; with --layers that skip blocks there is no "
            "single head. Leave out one of them."
        )


def _write_page(graphed: Graphed, path: Path) -> None:
    from ..graph_view import view_of
    from ..render.files import save_html
    from ..render.graph import graph_html

    view = dataclasses.replace(view_of(graphed.kept), model_name=graphed.question.model_name)
    save_html(path, graph_html(view))


def graph_command(
    model: o.ModelOption,
    prompt: o.PromptOption = None,
    prompt_file: o.PromptFileOption = None,
    strip_newline: o.StripNewlineOption = False,
    chat: o.ChatOption = False,
    system: o.SystemOption = None,
    answer: o.AnswerOption = "",
    target: o.TargetOption = None,
    contrast: o.ContrastOption = None,
    pos: o.PosOption = -1,
    rules: o.RulesOption = o.DEFAULT_RULES,
    device: o.DeviceOption = None,
    dtype: o.DtypeOption = o.Dtype.FLOAT32,
    granularity: Annotated[
        o.Granularity, typer.Option(help="sublayer: attention and MLP of a block apart.")
    ] = o.Granularity.BLOCK,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="0,4,8", help="Only these blocks' inputs, and the output. Slow if they skip."
        ),
    ] = None,
    heads: Annotated[
        bool, typer.Option("--heads", help="Split edges by head, and by value and key path.")
    ] = False,
    node_threshold: Annotated[
        float,
        typer.Option(min=0, help="Do not expand hidden states of |relevance| up to this (logits)."),
    ] = 0.0,
    mass: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Keep, per transition, the fewest largest edges with this share of Σ|weight|. "
            "Default: 0.85, unless another rule is given; of several, edges must satisfy all.",
        ),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(min=0, help="Keep edges of |weight| above this (logits).")
    ] = None,
    relative: Annotated[
        float | None, typer.Option(min=0, help="Keep edges of |weight| above this times |Δℓ|.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Keep so many largest edges per transition.")
    ] = None,
    no_connected: Annotated[
        bool,
        typer.Option("--no-connected", help="Keep edges that do not lead to the prediction, too."),
    ] = False,
    top: Annotated[int, typer.Option(min=1, help="How many paths are listed.")] = 10,
    json: o.JsonOption = False,
    save: Annotated[
        Path | None,
        typer.Option(help="Write the full graph (safetensors); AttributionGraph.load reads it."),
    ] = None,
    save_pruned: Annotated[
        bool, typer.Option("--save-pruned", help="Have --save write the pruned graph instead.")
    ] = False,
    out: o.OutOption = None,
    quiet: o.QuietOption = False,
    debug: o.DebugOption = False,
) -> None:
    """Show how the relevance of one prediction flows between tokens and layers.

    A node is a hidden state (site, position); an edge's weight is the relevance that its target
    passes down to its source, in logits; positive pushes towards the target token. Prints what
    pruning kept and left out, the strongest paths of the full graph, and a line a site of the
    pruned one.

    **--json** prints one object. *status* is "graph", with *version, model, rules, dtype, device,
    objective, pos, target, contrast, delta, candidates, notes* as **explain --json**;
    *granularity*; *sites* (HookPoint names); *node_threshold* (*logits, relative* to |Δℓ|); *full*
    and *kept* (*nodes, edges, mass*: Σ|weight|; kept also *edge_share, mass_share*, and
    *weakest_kept, strongest_left_out*: *logits, relative*); *pruning* (for each step *name,
    parameters, edges_before, edges_kept, mass_before, mass_kept*); *paths* (*strength, share* of
    Δℓ; node by node *sites, positions, tokens, relevance*; edge by edge *weights, heads, kinds*,
    the last two null without --heads), *closed* (nodes whose edges cancel, which no path passes);
    *metrics* (for each site of the pruned graph, as AttributionGraph.metrics); *page, saved*
    (paths or null).
    Without --contrast as **explain --json**.
    """
    typed = locals().copy()
    check_typed(typed)
    if out is not None and out == save:
        raise typer.BadParameter("--out and --save name the same file.")
    if save_pruned and save is None:
        raise typer.BadParameter("--save-pruned goes with --save.")
    if not math.isfinite(node_threshold):
        raise typer.BadParameter("--node-threshold must be a finite number.")
    chosen = _layers(layers)
    if chosen is not None and granularity is not o.Granularity.BLOCK:
        raise typer.BadParameter("--layers goes with --granularity block.")
    pruning = Pruning(mass, threshold, relative, top_k, not no_connected)
    pruning.check()
    output = Output(top, json, out, save, quiet)
    with exit_codes(debug):
        bridge, question = ask("graph", typed, output)
        if chosen is not None:
            _check_layers(chosen, int(bridge.cfg.n_layers), heads)
        full = _build(
            bridge,
            question,
            rules.value,
            output,
            granularity=granularity.value,
            layers=chosen,
            node_threshold=node_threshold,
            heads=heads,
        )
        with progress("Pruning, and looking for paths", output.spins):
            graphed = Graphed(question, full, pruning.of(full), full.paths(top))
            write(out, lambda path: _write_page(graphed, path))
            write(save, graphed.kept.save if save_pruned else full.save)
        from .tell_graph import graph_as_json, print_graphed

        if json:
            print_json(graph_as_json(graphed, output))
        else:
            print_graphed(graphed, output, save_pruned)
