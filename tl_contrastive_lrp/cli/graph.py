"""The command ``graph``: the attribution graph of one prediction, pruned, printed and written."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as o
from .ask import ask
from .errors import exit_codes
from .make_graph import LONG, GraphShape, is_long, long_note, make_graph
from .memory import MemoryOptions, RunPlan
from .output import Output, write
from .print_attribution import print_json
from .pruning import Pruning
from .results import Graphed
from .terminal import print_err, progress

if TYPE_CHECKING:
    from torch import Tensor

    from ..engine.prefilled import Prefilled


@dataclass(frozen=True, eq=False, repr=False)
class GraphOptions(o.QuestionOptions):
    """The options of ``graph``."""

    granularity: Annotated[
        o.Granularity, typer.Option(help="sublayer: attention and MLP of a block apart.")
    ] = o.Granularity.BLOCK
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="0,4,8", help="Only these blocks' inputs, and the output. Slow if they skip."
        ),
    ] = None
    heads: Annotated[
        bool, typer.Option("--heads", help="Split edges by head, and by value and key path.")
    ] = False
    node_threshold: Annotated[
        float,
        typer.Option(min=0, help="Do not expand hidden states of |relevance| up to this (logits)."),
    ] = 0.0
    mass: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Keep, per transition, the fewest largest edges with this share of Σ|weight|. "
            "Default: 0.85, unless another rule is given; of several, edges must satisfy all.",
        ),
    ] = None
    threshold: Annotated[
        float | None, typer.Option(min=0, help="Keep edges of |weight| above this (logits).")
    ] = None
    relative: Annotated[
        float | None, typer.Option(min=0, help="Keep edges of |weight| above this times |Δℓ|.")
    ] = None
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Keep this many of the largest edges per transition.")
    ] = None
    no_connected: Annotated[
        bool,
        typer.Option("--no-connected", help="Also keep edges that do not lead to the prediction."),
    ] = False
    top: Annotated[int, typer.Option(min=1, help="How many paths are listed.")] = 10
    json: o.JsonOption = False
    memory: o.MemoryOption = o.Memory.AUTO
    tile: o.TileOption = None
    checkpoint_dir: o.CheckpointDirOption = None
    attention: o.AttentionOption = o.Attention.AUTO
    save: Annotated[
        Path | None,
        typer.Option(
            help="Write the full graph (safetensors), of a prompt above 2,000 tokens what pruning "
            "left; AttributionGraph.load reads it."
        ),
    ] = None
    save_pruned: Annotated[
        bool, typer.Option("--save-pruned", help="Make --save write the pruned graph instead.")
    ] = False
    out: o.OutOption = None
    quiet: o.QuietOption = False
    debug: o.DebugOption = False

    def require_consistent(self) -> None:
        """Refuse options that contradict each other, before any file is read.

        Raises:
            typer.BadParameter: They contradict each other.
        """
        super().require_consistent()
        if self.save_pruned and self.save is None:
            raise typer.BadParameter("--save-pruned goes with --save.")
        if not math.isfinite(self.node_threshold):
            raise typer.BadParameter("--node-threshold must be a finite number.")
        if self.layers is not None and self.granularity is not o.Granularity.BLOCK:
            raise typer.BadParameter("--layers goes with --granularity block.")

    @property
    def shape(self) -> GraphShape:
        """Which edges the graph has.

        Raises:
            typer.BadParameter: ``--layers`` is no list of numbers.
        """
        return GraphShape(self.granularity.value, _layers(self.layers), self.heads)


def _layers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", text):
        raise typer.BadParameter(f"--layers {text!r}: give block numbers, such as 0,4,8.")
    return tuple(int(number) for number in text.split(","))


def _check_layers(shape: GraphShape, n_blocks: int) -> None:
    """Refuse layers that the model does not have, and heads across several blocks.

    Raises:
        typer.BadParameter: Either of them.
    """
    if shape.layers is None:
        return
    sites = sorted({*shape.layers, n_blocks})
    if sites[-1] > n_blocks or len(sites) < 2:
        raise typer.BadParameter(
            f"--layers: the model has blocks 0 to {n_blocks - 1}; the final output ({n_blocks}) is "
            "always there."
        )
    if shape.heads and _skips_blocks(shape, n_blocks):
        raise typer.BadParameter(
            "--heads splits edges within one block; with --layers that skip blocks there is no "
            "single head. Leave out one of them."
        )


def _skips_blocks(shape: GraphShape, n_blocks: int) -> bool:
    """Whether a transition spans several blocks."""
    if shape.layers is None:
        return False
    return sorted({*shape.layers, n_blocks}) != list(range(min(shape.layers), n_blocks + 1))


def _write_page(graphed: Graphed, path: Path) -> None:
    from ..files import save_html
    from ..graph.picture import view_of
    from ..render.graph.picture import graph_html

    view = dataclasses.replace(view_of(graphed.pruned), model_name=graphed.question.model_name)
    save_html(path, graph_html(view))


def _prepare(
    model: Any,
    tokens: Tensor,
    options: GraphOptions,
    shape: GraphShape,
    output: Output,
    memory: MemoryOptions,
) -> tuple[RunPlan, Prefilled]:
    """Plan the use of memory, and run the prompt's one forward.

    Raises:
        typer.BadParameter: ``--layers`` do not go with the model or with other options.
    """
    from ..engine.prefilled import prefill_prompt
    from ..engine.reading import BlockCall
    from ..graph.assembly.plain import graph_readings
    from ..graph.assembly.plan import GraphPlan

    n_blocks, rules = int(model.cfg.n_layers), options.rules.value
    _check_layers(shape, n_blocks)
    why_plain = ""
    if _skips_blocks(shape, n_blocks):
        why_plain = "--layers that skip blocks need the plain engine."
    if why_plain and memory.memory == "tiled":
        raise typer.BadParameter(why_plain)
    n, calls = int(tokens.shape[1]), dict[int, BlockCall]()
    run = memory.plan(
        model, n, "graph", why_plain=why_plain, graphs=1, by_head=shape.heads, pruned=n > LONG
    )
    plan = GraphPlan.of(
        model,
        rules,
        granularity=shape.granularity,
        layers=shape.layers,
        heads=shape.heads,
    )
    # Tiles show a progress bar of their own, with which a spinner would clash.
    spinner = output.shows_progress and not run.is_tiled
    with progress(f"Forward through {n:,} tokens", spinner):
        prefilled = prefill_prompt(
            model,
            tokens,
            rules,
            graph_readings(plan, calls),
            run.plan,
            pos=options.pos,
            calls=calls,
            progress=output.shows_progress,
            attention=memory.attention,
        )
    return run, prefilled


@o.takes_options
def graph_command(options: GraphOptions) -> None:
    """Show how the relevance of one prediction flows between tokens and layers.

    A node is a hidden state (site, position); an edge's weight is the relevance that its target
    passes down to its source, in logits; positive pushes towards the target token. Prints what
    pruning kept and left out, the strongest paths of the full graph, and one line for each site of
    the pruned one. Above 2,000 tokens the full graph is never held: edges are pruned while they are
    computed, and paths are those of the remaining edges.

    **--json** prints one object. *status* is "graph", with *version, model, rules, dtype, device,
    objective, pos, target, contrast, delta, candidates, notes* as **explain --json**;
    *granularity*; *sites* (HookPoint names); *node_threshold* (*logits, relative* to |Δℓ|); *full*
    and *kept* (*nodes, edges, mass*: Σ|weight|; kept also *edge_share, mass_share*, and
    *weakest_kept, strongest_left_out*: *logits, relative, at_most*); *pruning* (for each step
    *name, parameters, edges_before, edges_kept, mass_before, mass_kept*); *paths* (*strength,
    share* of Δℓ; node by node *sites, positions, tokens, relevance*; edge by edge *weights, heads,
    kinds*, the last two null without --heads), *closed* (nodes whose edges cancel, which no path
    passes); *metrics* (for each site of the pruned graph, as AttributionGraph.metrics); *memory*
    (*way, plain_bytes, free_bytes*) as **explain --json**; *page, saved* (paths or null). Above
    2,000 tokens *nodes* of the full graph is null, and *at_most* says that *strongest_left_out* is
    a bound.
    Without --contrast as **explain --json**.
    """
    options.require_consistent()
    output = Output(options.top, options.json, options.out, options.save, options.quiet)
    shape = options.shape
    pruning = Pruning.from_options(
        mass=options.mass,
        threshold=options.threshold,
        relative=options.relative,
        top_k=options.top_k,
        connected=not options.no_connected,
    )
    memory = MemoryOptions(
        options.memory.value, options.tile, options.checkpoint_dir, options.attention.value
    )
    with exit_codes(options.debug):

        def forward(model: Any, tokens: Tensor) -> tuple[Tensor, tuple[RunPlan, Prefilled]]:
            run, prefilled = _prepare(model, tokens, options, shape, output, memory)
            return prefilled.logits, (run, prefilled)

        model, question, (run, prefilled) = ask("graph", options, output, memory, forward)
        run.announce(output)
        note = long_note(question, saves_full=options.save is not None and not options.save_pruned)
        if note and not options.quiet:
            print_err(f"Note: {note}")
        notes = (*question.notes, *filter(None, (run.note, note)))
        full = make_graph(
            model,
            question,
            options.rules.value,
            output,
            run,
            pruning if is_long(question) else None,
            shape=shape,
            node_threshold=options.node_threshold,
            prefilled=prefilled,
        )
        with progress("Pruning, and looking for paths", output.shows_progress):
            pruned, paths = pruning.apply(full), full.paths(options.top)
            graphed = Graphed(question, full, pruned, paths, run, notes)
            write(options.out, lambda path: _write_page(graphed, path))
            write(options.save, pruned.save if options.save_pruned else full.save)
        from .print_graph import graph_as_json, print_graphed

        if options.json:
            print_json(graph_as_json(graphed, output))
        else:
            print_graphed(graphed, output, options.save_pruned)
