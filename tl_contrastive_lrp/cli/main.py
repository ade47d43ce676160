"""The command ``tl-contrastive-lrp``: explain one wrong token from the shell.

Torch and TransformerLens are imported inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as o
from .ask import ask
from .check import check_command
from .demo import explain_case, list_failures
from .errors import exit_codes
from .explain import Prepared, explain, prepare
from .graph import graph_command
from .memory import MemoryOptions
from .output import Output
from .print_attribution import as_json, print_explained, print_json
from .retype import PROGRAM
from .study import study_app
from .terminal import print_out
from .tokens import tokens_command

if TYPE_CHECKING:
    from torch import Tensor

app = typer.Typer(
    name=PROGRAM,
    epilog=o.EXIT_CODES,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(given: bool) -> None:
    """Print the version and exit, if ``--version`` is given."""
    if given:
        from .. import __version__

        print_out(f"{PROGRAM} {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Why did the language model write this wrong token and not that right one?

    Relevance of every prompt token for logit(target) − logit(contrast). Try **demo** first: a
    small model that comes with the package, without network. Then **explain** your own, and
    see in **graph** how it flows between tokens and layers. **tokens** lists an answer token by
    token, to find the one that went wrong.
    """


@dataclass(frozen=True, eq=False, repr=False)
class ExplainOptions(o.QuestionOptions):
    """The options of ``explain``."""

    memory: o.MemoryOption = o.Memory.AUTO
    tile: o.TileOption = None
    checkpoint_dir: o.CheckpointDirOption = None
    attention: o.AttentionOption = o.Attention.AUTO
    top: o.TopOption = 10
    json: o.JsonOption = False
    save: o.SaveOption = None
    out: o.OutOption = None
    no_graph: o.NoGraphOption = False
    check: o.CheckOption = False
    quiet: o.QuietOption = False
    debug: o.DebugOption = False


@app.command("explain", epilog=o.EXIT_CODES)
@o.takes_options
def explain_command(options: ExplainOptions) -> None:
    """Explain why a model preferred one token (target) to another (contrast).

    Prints the prompt's tokens of largest relevance for Δℓ = logit(target) − logit(contrast).
    Positive relevance pushed towards the target, negative towards the contrast.

    **--json** prints one object. *status* is "explained", with *version, model, rules, dtype,
    device*; *objective* (in words); *pos* (from 0); *target* and *contrast* (*ids, tokens, logit*;
    target also *is_top*); *delta* (Δℓ, in logits); *share_to_tokens* (how much of Δℓ reaches the
    prompt); *tokens* (for each position *pos, id, token, relevance, share, greyed*);
    *messages* (of a chat, for each message and the template's text between them *segment, role,
    kind, start, stop, n_tokens, relevance, share, positive, negative, largest_token*; else empty);
    *top*
    (positions by |relevance|); *ledger* (for each site *site, total, biases, positions, other*);
    *candidates* (*rank, token, id, logit, probability, minus_top*); *memory* (*way*: plain or
    tiled; *plain_bytes, free_bytes*: what the plain engine needs, and what was free); *attention*
    (eager, fused, or in how many blocks it was fused); *report, saved* (paths or null); *notes*;
    *check* (with --check *verdict, sentence, statistics, tokens* (*pos, predicted, measured*, in
    logits; *chosen*: strongest, random or empty), *replaced_with, forwards, seconds*; else null). A
    share of Δℓ is null where Δℓ is 0. Without --contrast, *status* is "needs_contrast", with
    *version, model, pos, candidates, command, notes*.
    """
    options.require_consistent()
    output = Output(options.top, options.json, options.out, options.save, options.quiet)
    memory = MemoryOptions(
        options.memory.value, options.tile, options.checkpoint_dir, options.attention.value
    )
    rules = options.rules.value
    with exit_codes(options.debug):

        def forward(model: Any, tokens: Tensor) -> tuple[Tensor, Prepared]:
            prepared = prepare(
                model,
                tokens,
                options.pos,
                rules=rules,
                output=output,
                memory=memory,
                with_graph=not options.no_graph,
            )
            return prepared.prefilled.logits, prepared

        model, question, prepared = ask("explain", options, output, memory, forward)
        explained = explain(
            model, question, prepared, rules=rules, output=output, with_check=options.check
        )
        if options.json:
            print_json(as_json(explained, output))
        else:
            print_explained(explained, output)


app.command("graph", epilog=o.EXIT_CODES)(graph_command)
app.command("tokens", epilog=o.EXIT_CODES)(tokens_command)
app.command("check", epilog=o.EXIT_CODES)(check_command)
app.add_typer(study_app, name="study")


@dataclass(frozen=True, eq=False, repr=False)
class DemoOptions:
    """The options of ``demo``."""

    case: Annotated[
        str | None,
        typer.Option(help="Id of a case, or its number in --list. Default: a short, clear one."),
    ] = None
    kind: Annotated[o.Kind | None, typer.Option(help="Only cases of this kind of task.")] = None
    list_cases: Annotated[bool, typer.Option("--list", help="List the failures.")] = False
    rules: o.RulesOption = o.DEFAULT_RULES
    top: o.TopOption = 10
    json: o.JsonOption = False
    save: o.SaveOption = None
    out: o.OutOption = None
    no_graph: o.NoGraphOption = False
    quiet: o.QuietOption = False
    debug: o.DebugOption = False


@app.command("demo", epilog=o.EXIT_CODES)
@o.takes_options
def demo_command(options: DemoOptions) -> None:
    """Explain a failure of the small model that comes with the package, without network.

    The benchmark it was trained on records which positions of the prompt decide the answer, so
    the table can be checked against them. **--json** prints what **explain --json** does, and
    *case* (*id, kind, family, user, answer, model_answer*; *decisive*: for each such position
    *pos, token, rank* by |relevance| from 1, *in_top_5*); with **--list**, *cases*.
    """
    output = Output(options.top, options.json, options.out, options.save, options.quiet)
    with exit_codes(options.debug):
        kind = options.kind.value if options.kind else None
        if options.list_cases:
            list_failures(kind, options.json)
            return
        output.check()
        explain_case(
            options.case,
            kind,
            rules=options.rules.value,
            output=output,
            with_graph=not options.no_graph,
        )


def main() -> None:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # for terminals that cannot show Δ
    app(prog_name=PROGRAM)
