"""Turns a command's options into a model and a question, or into candidates to choose from."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from .errors import Code, in_shell
from .memory import MemoryOptions
from .model import is_local, load_model, quiet_libraries
from .options import QuestionOptions
from .output import Output
from .print_attribution import candidate_rows, print_candidates, print_json
from .prompt import (
    chat_ids,
    check_text,
    prompt_ids,
    read_json,
    read_prompt,
    special_notes,
    token_ids,
    token_word,
)
from .question import N_CANDIDATES, Question, question_of
from .retype import retyped
from .terminal import print_err, print_out, progress

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

T = TypeVar("T")


def ask(
    command: str,
    options: QuestionOptions,
    output: Output,
    memory: MemoryOptions,
    forward: Callable[[Any, Tensor], tuple[Tensor, T]],
) -> tuple[Any, Question, T]:
    """Load the model and build the question that the options describe.

    Args:
        command: "explain" or "graph".
        options: Its options.
        output: Where results go, and how much is printed.
        memory: How memory may be used.
        forward: Runs the prompt's one forward, given the model and the token ids [1, pos]; returns
            the logits [vocab] at the position, and what the command continues with.

    Returns:
        The model, the question, and the second value that ``forward`` returned.

    Raises:
        typer.Exit: No contrast was given, so candidates and a command to type were printed.
        CliError, TokenError, PromptError: The prompt, a token or the model is not usable.
    """
    chat = options.messages is not None
    text = "" if chat else read_prompt(options.prompt, options.prompt_file, options.strip_newline)
    messages = None if options.messages is None else read_json(options.messages, "messages")
    tools = None if options.tools is None else read_json(options.tools, "tools")
    check_text(options.system, "system message")
    check_text(options.answer, "answer")
    output.check()
    memory.check()
    name = options.model or options.adapter or ""
    remark = "" if is_local(name) else " (the first use downloads it)"
    with progress(f"Loading {name}{remark}", output.shows_progress):
        device = options.device.value if options.device else None
        loaded = load_model(options.model, device, options.dtype.value, options.adapter)
        model = loaded.bridge
        from ..attribution.candidates import candidate_table

    with quiet_libraries():  # a long prompt makes the tokenizer write to stderr
        if messages is not None:
            prompt = chat_ids(model, messages, tools, options.answer)
        else:
            prompt = prompt_ids(
                model,
                text,
                chat=options.chat,
                system=options.system,
                answer=options.answer,
                prepend_bos=options.prepend_bos,
            )
    tokens = prompt.tokens
    target = token_ids(model, options.target, "target") if options.target else ()
    contrast = token_ids(model, options.contrast, "contrast") if options.contrast else ()
    if contrast:
        logits, prepared = forward(model, tokens)
    else:  # only the candidates are shown
        logits, prepared = _next_logits(model, tokens, options.pos, output, memory), None
    candidates = candidate_table(model, logits, N_CANDIDATES)
    ids = [int(i) for i in candidates["id"]]
    notes = [*loaded.notes, *_notes(model, text, options, tokens[0].tolist(), candidates)]
    notes = [in_shell(note) for note in notes]
    if not output.quiet:
        for note in notes:
            print_err(f"Note: {note}")
    if prepared is None:
        alternative = next(i for i in ids if i not in (target or ids[:1]))
        line = retyped(
            command,
            options,
            text,
            target=options.target or [token_word(model, ids[0])],
            contrast=[token_word(model, alternative)],
        )
        if output.as_json:
            pos = options.pos % tokens.shape[1]
            print_json(_candidates_as_json(loaded.name, candidates, line, pos, notes))
        else:
            _print_choice(candidates, line)
        raise typer.Exit(Code.PROMPT)
    question = question_of(
        model,
        tokens,
        logits,
        target or (ids[0],),
        contrast,
        pos=options.pos,
        model_name=loaded.name,
        prepended_bos=prompt.prepended_bos,
        segments=prompt.segments,
        notes=notes,
    )
    return model, question, prepared


def _next_logits(
    model: Any, tokens: Tensor, pos: int, output: Output, memory: MemoryOptions
) -> Tensor:
    """The logits [vocab] at a position, in tiles where the prompt would be explained in tiles."""
    from ..attribution.candidates import logits_at
    from ..engine.fused import fused_blocks
    from ..engine.memory import plan_memory

    length = int(tokens.shape[1])
    fused = fused_blocks(model, memory.attention, length)
    plan = plan_memory(model, length, memory.memory, memory.tile, fused=fused)
    with progress(
        "Asking the model for its next token", output.shows_progress and plan.tile is None
    ):
        return logits_at(
            model, tokens, pos, memory.memory, memory.tile, progress=output.shows_progress,
            attention=memory.attention,
        )  # fmt: skip


def _notes(
    model: Any, text: str, options: QuestionOptions, ids: list[int], candidates: pd.DataFrame
) -> list[str]:
    """Notes on options that may not be what the user meant."""
    notes = []
    if options.prompt_file and text.endswith("\n") and not options.strip_newline:
        notes.append(
            "The file's last newline is part of the prompt; --strip-newline leaves it out."
        )
    if not options.chat and options.messages is None:
        notes += special_notes(model, text, options.prepend_bos)
    bos = model.tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos] and options.prepend_bos is None:
        notes.append("The prompt begins with two BOS tokens: leave the BOS out of its text.")
    likely = set(candidates["token"])
    for role, words in (("target", options.target), ("contrast", options.contrast)):
        for word in words or ():
            if word not in likely and f" {word}" in likely:
                notes.append(
                    f"The {role} is {word!r}; the model's likely token is {' ' + word!r}, with a "
                    "leading space."
                )
    return notes


def _candidates_as_json(
    model_name: str, candidates: pd.DataFrame, command: str, pos: int, notes: list[str]
) -> dict[str, Any]:
    """The JSON object for a question without a contrast."""
    from .. import __version__

    return {
        "status": "needs_contrast",
        "version": __version__,
        "model": model_name,
        "pos": pos,
        "candidates": candidate_rows(candidates),
        "command": command,
        "notes": notes,
    }


def _print_choice(candidates: pd.DataFrame, command: str) -> None:
    """Print the candidates for a contrast, and a command that names one of them."""
    print_out("The model's most likely next tokens:")
    print_candidates(candidates)
    print_out(
        "Which of them, or which other token, should it have written? Name it with --contrast."
    )
    print_out("For the most likely alternative, type:")
    print_out()
    print_out(command)
