"""The command ``tl-contrastive-lrp``: explain one wrong token from the shell.

Torch and TransformerLens are imported inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from . import demo as demo_room
from .command import PROGRAM, again
from .exit import Code, exit_codes
from .explain import Output, explain
from .model import is_local, load_model
from .options import (
    EXIT_CODES,
    DebugOption,
    Device,
    Dtype,
    JsonOption,
    Kind,
    OutOption,
    QuietOption,
    Rules,
    RulesOption,
    SaveOption,
    TopOption,
)
from .prompt import prompt_ids, read_prompt, token_ids, token_word
from .tell import (
    as_json,
    candidate_rows,
    print_candidates,
    print_explained,
    print_json,
)
from .terminal import progress, say, tell

CANDIDATES = 10

app = typer.Typer(
    name=PROGRAM,
    epilog=EXIT_CODES,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        tell(f"{PROGRAM} {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Why did the language model write this wrong token and not that right one?

    Relevance of every prompt token for logit(target) − logit(contrast). Try **demo** first: a
    small model that comes with the package, without network. Then **explain** your own.
    """


@app.command("explain", epilog=EXIT_CODES)
def explain_command(
    model: Annotated[
        str, typer.Option(help="Folder of a Hugging Face model, or its name on the hub.")
    ],
    prompt: Annotated[str | None, typer.Option(help="The text that the model continued.")] = None,
    prompt_file: Annotated[
        str | None,
        typer.Option(help="Read it from a UTF-8 file, character by character; - is stdin."),
    ] = None,
    strip_newline: Annotated[
        bool, typer.Option("--strip-newline", help="Drop the file's last newline.")
    ] = False,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="The prompt is a user's message: apply the chat template."),
    ] = False,
    system: Annotated[str | None, typer.Option(help="System message, with --chat.")] = None,
    answer: Annotated[
        str, typer.Option(help="What the assistant had written so far, with --chat.")
    ] = "",
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="The token the model preferred, as text (a leading space counts) or as id:123. "
            "Repeat for a set, which counts as its mean. Default: the model's top token."
        ),
    ] = None,
    contrast: Annotated[
        list[str] | None,
        typer.Option(
            help="The token it should have preferred, likewise. Without it, candidates are listed."
        ),
    ] = None,
    pos: Annotated[
        int, typer.Option(help="Explain the token after this position (-1: the last).")
    ] = -1,
    rules: RulesOption = Rules.ATTNLRP,
    device: Annotated[Device | None, typer.Option(help="Default: cuda where there is one.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of weights and activations.")] = Dtype.FLOAT32,
    top: TopOption = 10,
    json: JsonOption = False,
    save: SaveOption = None,
    out: OutOption = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Explain why a model preferred one token (target) to another (contrast).

    Prints the prompt's tokens of largest relevance for Δℓ = logit(target) − logit(contrast).
    Positive relevance pushed towards the target, negative towards the contrast.

    **--json** prints one object. *status* is "explained", with *version, model, rules, dtype,
    device*; *objective* (in words); *pos* (from 0); *target* and *contrast* (*ids, tokens, logit*;
    target also *is_top*); *delta* (Δℓ, in logits); *share_to_tokens* (how much of Δℓ reaches the
    prompt); *tokens* (for each position *pos, id, token, relevance, share, greyed*); *top*
    (positions by |relevance|); *ledger* (for each site *site, total, biases, positions, other*);
    *candidates* (*rank, token, id, logit, probability, minus_top*); *report, saved* (paths or
    null); *notes*. A share of Δℓ is null where Δℓ is 0. Without --contrast, *status* is
    "needs_contrast", with *version, model, pos, candidates, command, notes*.
    """
    typed = locals().copy()
    if (prompt is None) == (prompt_file is None):
        raise typer.BadParameter("Give the prompt with either --prompt or --prompt-file.")
    if not chat and (system is not None or answer):
        raise typer.BadParameter("--system and --answer go with --chat.")
    if out is not None and out == save:
        raise typer.BadParameter("--out and --save name the same file.")
    output = Output(top, json, out, save, quiet)
    with exit_codes(debug):
        text = read_prompt(prompt, prompt_file, strip_newline)
        output.check()
        where = "" if is_local(model) else " (the first use downloads it)"
        with progress(f"Loading {model}{where}", output.spins):
            bridge = load_model(model, device.value if device else None, dtype.value)
        _explain(bridge, text, typed, output)


def _explain(bridge: Any, text: str, typed: dict[str, Any], output: Output) -> None:
    """The rest of ``explain``, with a model."""
    from ..objective import next_token_table

    tokens = prompt_ids(
        bridge, text, chat=typed["chat"], system=typed["system"], answer=typed["answer"]
    )
    target = token_ids(bridge, typed["target"], "target") if typed["target"] else ()
    contrast = token_ids(bridge, typed["contrast"], "contrast") if typed["contrast"] else ()
    with progress("Asking the model for its next token", output.spins):
        candidates = next_token_table(bridge, tokens, k=CANDIDATES, pos=typed["pos"])
    ids = [int(i) for i in candidates["id"]]
    notes = _notes(bridge, text, typed, tokens[0].tolist(), candidates)
    if not output.quiet:
        for note in notes:
            say(f"Note: {note}")
    if not contrast:
        other = next(i for i in ids if i not in (target or ids[:1]))
        command = again(
            typed,
            text,
            target=typed["target"] or [token_word(bridge, ids[0])],
            contrast=[token_word(bridge, other)],
        )
        _show_candidates(typed, candidates, command, int(typed["pos"]) % tokens.shape[1], notes)
        raise typer.Exit(Code.PROMPT)
    explained = explain(
        bridge,
        tokens,
        candidates,
        target or (ids[0],),
        contrast,
        pos=typed["pos"],
        rules=typed["rules"].value,
        model_name=typed["model"],
        notes=notes,
        output=output,
    )
    if output.as_json:
        print_json(as_json(explained, output))
    else:
        print_explained(explained, output)


def _notes(
    bridge: Any, text: str, typed: dict[str, Any], ids: list[int], candidates: Any
) -> list[str]:
    """What the user may have meant otherwise."""
    notes = []
    if typed["prompt_file"] and text.endswith("\n") and not typed["strip_newline"]:
        notes.append(
            "The file's last newline is part of the prompt; --strip-newline leaves it out."
        )
    bos = bridge.tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        notes.append("The prompt begins with two BOS tokens: leave the BOS out of its text.")
    likely = set(candidates["token"])
    for role in ("target", "contrast"):
        for word in typed[role] or ():
            if word not in likely and f" {word}" in likely:
                notes.append(
                    f"The {role} is {word!r}; the model's likely token is {' ' + word!r}, with a "
                    "leading space."
                )
    return notes


def _show_candidates(
    typed: dict[str, Any], candidates: Any, command: str, pos: int, notes: list[str]
) -> None:
    from .. import __version__

    if typed["json"]:
        print_json(
            {
                "status": "needs_contrast",
                "version": __version__,
                "model": typed["model"],
                "pos": pos,
                "candidates": candidate_rows(candidates),
                "command": command,
                "notes": notes,
            }
        )
        return
    tell("The model's likeliest next tokens:")
    print_candidates(candidates)
    tell("Which of them, or which other token, should it have written? Name it with --contrast.")
    tell("For the likeliest alternative, type:")
    tell()
    tell(command)


@app.command("demo", epilog=EXIT_CODES)
def demo_command(
    case: Annotated[
        str | None,
        typer.Option(help="Id of a case, or its number in --list. Default: one that shows well."),
    ] = None,
    kind: Annotated[Kind | None, typer.Option(help="Only cases of this kind of task.")] = None,
    list_cases: Annotated[bool, typer.Option("--list", help="List the failures.")] = False,
    rules: RulesOption = Rules.ATTNLRP,
    top: TopOption = 10,
    json: JsonOption = False,
    save: SaveOption = None,
    out: OutOption = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Explain a failure of the small model that comes with the package, without network.

    The benchmark it was trained on records which positions of the prompt decide the answer, so
    the table can be checked against them. **--json** prints what **explain --json** does, and
    *case* (*id, kind, family, user, answer, model_answer*; *decisive*: for each such position
    *pos, token, rank* by |relevance| from 1, *in_top_5*); with **--list**, *cases*.
    """
    output = Output(top, json, out, save, quiet)
    if out is not None and out == save:
        raise typer.BadParameter("--out and --save name the same file.")
    with exit_codes(debug):
        wanted = kind.value if kind else None
        if list_cases:
            demo_room.list_failures(wanted, json)
            return
        output.check()
        demo_room.run(case, wanted, rules.value, output, CANDIDATES)


def main() -> None:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show Δ must not crash us
    app(prog_name=PROGRAM)
