"""What was asked: from typed options to a model, a prompt and two tokens, or to the candidates."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import typer

from .errors import Code
from .memory import MemoryOptions
from .model import is_local, load_model, quiet_libraries
from .output import Output
from .print_attribution import candidate_rows, print_candidates, print_json
from .prompt import check_text, prompt_ids, read_prompt, special_notes, token_ids, token_word
from .question import CANDIDATES, Question, T, question_of
from .retype import again
from .terminal import print_err, print_out, progress

if TYPE_CHECKING:
    from torch import Tensor


def check_typed(typed: dict[str, Any]) -> None:
    """Refuse options that contradict each other, before anything is read.

    Raises:
        typer.BadParameter: they do.
    """
    if typed["model"] is None and typed["adapter"] is None:
        raise typer.BadParameter("Missing option '--model'.")
    if (typed["prompt"] is None) == (typed["prompt_file"] is None):
        raise typer.BadParameter("Give the prompt with either --prompt or --prompt-file.")
    if not typed["chat"] and (typed["system"] is not None or typed["answer"]):
        raise typer.BadParameter("--system and --answer go with --chat.")
    if typed["chat"] and typed["prepend_bos"] is not None:
        raise typer.BadParameter(
            "--bos and --no-bos are for a prompt without --chat: the chat template "
            "says whether it begins with the BOS token."
        )


def ask(
    command: str,
    typed: dict[str, Any],
    output: Output,
    way: MemoryOptions,
    forward: Callable[[Any, Tensor], tuple[Tensor, T]],
) -> tuple[Any, Question, T]:
    """The model and the question that the options of ``command`` name.

    Args:
        command: "explain" or "graph".
        typed: Its options by name.
        output: How much is said.
        way: How memory is used.
        forward: Runs the prompt's one forward, of (model, token ids [1, pos]); gives the logits
            [vocab] at the position, and what the command goes on with.

    Returns:
        The model, the question, and what ``forward`` gave.

    Raises:
        typer.Exit: no contrast was given; the candidates and a command to type are printed.
        CliError, TokenError, PromptError: see their messages.
    """
    text = read_prompt(typed["prompt"], typed["prompt_file"], typed["strip_newline"])
    check_text(typed["system"], "system message")
    check_text(typed["answer"], "answer")
    output.check()
    way.check()
    name, adapter, device = typed["model"], typed["adapter"], typed["device"]
    where = "" if is_local(name or adapter) else " (the first use downloads it)"
    with progress(f"Loading {name or adapter}{where}", output.spins):
        loaded = load_model(name, device.value if device else None, typed["dtype"].value, adapter)
        model, name = loaded.bridge, loaded.name
        from ..attribution.candidates import candidate_table

    with quiet_libraries():  # a long prompt makes the tokenizer write to stderr
        given = prompt_ids(
            model,
            text,
            chat=typed["chat"],
            system=typed["system"],
            answer=typed["answer"],
            prepend_bos=typed["prepend_bos"],
        )
    tokens = given.tokens
    target = token_ids(model, typed["target"], "target") if typed["target"] else ()
    contrast = token_ids(model, typed["contrast"], "contrast") if typed["contrast"] else ()
    if contrast:
        logits, ready = forward(model, tokens)
    else:  # only the candidates are shown
        logits, ready = next_logits(model, tokens, typed["pos"], output, way), None
    candidates = candidate_table(model, logits, CANDIDATES)
    ids = [int(i) for i in candidates["id"]]
    notes = [*loaded.notes, *_notes(model, text, typed, tokens[0].tolist(), candidates)]
    if not output.quiet:
        for note in notes:
            print_err(f"Note: {note}")
    if ready is None:
        other = next(i for i in ids if i not in (target or ids[:1]))
        line = again(
            command,
            typed,
            text,
            target=typed["target"] or [token_word(model, ids[0])],
            contrast=[token_word(model, other)],
        )
        _show_candidates(
            typed | {"model": name}, candidates, line, int(typed["pos"]) % tokens.shape[1], notes
        )
        raise typer.Exit(Code.PROMPT)
    question = question_of(
        model,
        tokens,
        logits,
        target or (ids[0],),
        contrast,
        pos=typed["pos"],
        model_name=name,
        prepended_bos=given.prepended_bos,
        notes=notes,
    )
    return model, question, ready


def next_logits(model: Any, tokens: Tensor, pos: int, output: Output, way: MemoryOptions) -> Tensor:
    """The logits [vocab] at a position, in tiles where the prompt is explained in tiles."""
    from ..attribution.candidates import logits_at
    from ..engine.memory import choose

    tiles = choose(model, tokens.shape[1], way.memory, way.tile).tile is not None
    with progress("Asking the model for its next token", output.spins and not tiles):
        return logits_at(model, tokens, pos, way.memory, way.tile, progress=output.spins)


def _notes(
    model: Any, text: str, typed: dict[str, Any], ids: list[int], candidates: Any
) -> list[str]:
    """What the user may have meant otherwise."""
    notes = []
    if typed["prompt_file"] and text.endswith("\n") and not typed["strip_newline"]:
        notes.append(
            "The file's last newline is part of the prompt; --strip-newline leaves it out."
        )
    if not typed["chat"]:
        notes += special_notes(model, text, typed["prepend_bos"])
    bos = model.tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos] and typed["prepend_bos"] is None:
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
    print_out("The model's likeliest next tokens:")
    print_candidates(candidates)
    print_out(
        "Which of them, or which other token, should it have written? Name it with --contrast."
    )
    print_out("For the likeliest alternative, type:")
    print_out()
    print_out(command)
