"""The command ``graph``: the attribution graph of one prediction, pruned, told and written."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as o
from .ask import ask, check_typed
from .errors import exit_codes
from .make_graph import is_long, long_note, make_graph
from .memory import MemoryOptions, RunPlan
from .output import Output, write
from .print_attribution import print_json
from .pruning import Pruning
from .results import Graphed
from .terminal import print_err, progress

if TYPE_CHECKING:
    from torch import Tensor

    from ..engine.prefilled import Prefilled


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
    if heads and _skips(layers, blocks):
        raise typer.BadParameter(
            "--heads splits edges within one block; with --layers that skip blocks there is no "
            "single head. Leave out one of them."
        )


def _skips(layers: list[int] | None, blocks: int) -> bool:
    """Whether a transition spans several blocks."""
    return layers is not None and sorted({*layers, blocks}) != list(range(min(layers), blocks + 1))


def _write_page(graphed: Graphed, path: Path) -> None:
    from ..files import save_html
    from ..graph.picture import view_of
    from ..render.graph.picture import graph_html

    view = dataclasses.replace(view_of(graphed.kept), model_name=graphed.question.model_name)
    save_html(path, graph_html(view))


def _prepared(
    model: Any,
    tokens: Tensor,
    pos: int,
    rules: str,
    output: Output,
    way: MemoryOptions,
    shape: dict[str, Any],
) -> tuple[RunPlan, Prefilled]:
    """How memory is used, and the prompt's one forward; ``shape`` as ``graph_build.plan_of``."""
    from ..engine.prefilled import prefill_prompt
    from ..engine.reading import BlockCall
    from ..graph.assembly.attribution_graph import plan_of
    from ..graph.assembly.plain import graph_readings

    skips = _skips(shape["layers"], int(model.cfg.n_layers))
    why = "--layers that skip blocks need the plain way." if skips else ""
    if why and way.memory == "tiled":
        raise typer.BadParameter(why)
    n, calls = int(tokens.shape[1]), dict[int, BlockCall]()
    run = way.run(model, n, "graph", plain_only=why, graphs=1, by_head=shape["heads"])
    readings = graph_readings(plan_of(model, tokens, rules, **shape), calls)
    # Tiles show a bar of their own; two moving things would clash.
    with progress(f"Forward through {n:,} tokens", output.spins and not run.tiles):
        prefilled = prefill_prompt(
            model,
            tokens,
            rules,
            readings,
            run.choice,
            may_fall_back=run.way.memory == "auto",
            pos=pos,
            calls=calls,
            progress=output.spins,
        )
    return run, prefilled


def graph_command(
    model: o.ModelOption = None,
    adapter: o.AdapterOption = None,
    prompt: o.PromptOption = None,
    prompt_file: o.PromptFileOption = None,
    strip_newline: o.StripNewlineOption = False,
    chat: o.ChatOption = False,
    system: o.SystemOption = None,
    answer: o.AnswerOption = "",
    prepend_bos: o.PrependBosOption = None,
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
    memory: o.MemoryOption = o.Memory.AUTO,
    tile: o.TileOption = None,
    checkpoint_dir: o.CheckpointDirOption = None,
    save: Annotated[
        Path | None,
        typer.Option(
            help="Write the full graph (safetensors), of a prompt above 2,000 tokens what pruning "
            "left; AttributionGraph.load reads it."
        ),
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
    pruned one. Above 2,000 tokens the full graph is never made: edges are pruned while they come,
    and paths are those of what is left.

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
    pruning = Pruning.from_options(
        mass=mass,
        threshold=threshold,
        relative=relative,
        top_k=top_k,
        connected=not no_connected,
    )
    way, output = MemoryOptions.typed(typed), Output(top, json, out, save, quiet)
    with exit_codes(debug):

        def forward(model: Any, tokens: Tensor) -> tuple[Tensor, tuple[RunPlan, Prefilled]]:
            if chosen is not None:
                _check_layers(chosen, int(model.cfg.n_layers), heads)
            shape = {"granularity": granularity.value, "layers": chosen, "heads": heads}
            ready = _prepared(model, tokens, pos, rules.value, output, way, shape)
            return ready[1].logits, ready

        bridge, question, (run, prefilled) = ask("graph", typed, output, way, forward)
        run.announce(output)
        note = long_note(question, save is not None and not save_pruned)
        if note and not quiet:
            print_err(f"Note: {note}")
        notes = (*question.notes, *filter(None, (run.note, note)))
        full = make_graph(
            bridge,
            question,
            rules.value,
            output,
            run,
            pruning if is_long(question) else None,
            granularity=granularity.value,
            layers=chosen,
            node_threshold=node_threshold,
            heads=heads,
            prefilled=prefilled,
        )
        with progress("Pruning, and looking for paths", output.spins):
            graphed = Graphed(question, full, pruning.apply(full), full.paths(top), run, notes)
            write(out, lambda path: _write_page(graphed, path))
            write(save, graphed.kept.save if save_pruned else full.save)
        from .print_graph import graph_as_json, print_graphed

        if json:
            print_json(graph_as_json(graphed, output))
        else:
            print_graphed(graphed, output, save_pruned)
