"""The command ``tokens``: an answer token by token, and how to explain the one that went wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as o
from .errors import CliError, Code, exit_codes, in_shell
from .memory import MemoryOptions
from .model import is_local, load_model, quiet_libraries
from .output import Output, write
from .print_attribution import candidate_rows, print_json
from .prompt import (
    chat_ids,
    check_text,
    prompt_ids,
    read_json,
    read_prompt,
    special_notes,
    token_word,
)
from .retype import retyped
from .terminal import print_err, print_out, progress, table

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from ..attribution.explain_answer import AnswerExplanations
    from ..inputs.tokens import Prompt

AnswerOption = Annotated[
    str, typer.Option(help="The answer to list, as it follows the prompt. Needed.")
]
RowOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Print the command that explains this token of the answer (the column row). Default: "
        "where the model most prefers another token, or is least sure.",
        show_default=False,
    ),
]


PageOption = Annotated[
    Path | None,
    typer.Option(
        help="Write an HTML page of the answer, in which a click on a token opens its explanation.",
        show_default=False,
    ),
]
ExplainOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="With --out: how many tokens to explain. The first at which the model prefers "
        "another comes first, then the others like it, then the closest decisions. Default: 8.",
        show_default=False,
    ),
]


@dataclass(frozen=True, eq=False, repr=False)
class _AgainOptions(o.QuestionOptions):
    """The options of the command that explains a token."""

    memory: o.MemoryOption = o.Memory.AUTO
    tile: o.TileOption = None
    attention: o.AttentionOption = o.Attention.AUTO


@dataclass(frozen=True, eq=False, repr=False)
class TokensOptions:
    """The options of ``tokens``."""

    model: o.ModelOption = None
    adapter: o.AdapterOption = None
    prompt: o.PromptOption = None
    prompt_file: o.PromptFileOption = None
    strip_newline: o.StripNewlineOption = False
    chat: o.ChatOption = False
    system: o.SystemOption = None
    messages: o.MessagesOption = None
    tools: o.ToolsOption = None
    answer: AnswerOption = ""
    prepend_bos: o.PrependBosOption = None
    row: RowOption = None
    device: o.DeviceOption = None
    dtype: o.DtypeOption = o.Dtype.FLOAT32
    memory: o.MemoryOption = o.Memory.AUTO
    tile: o.TileOption = None
    attention: o.AttentionOption = o.Attention.AUTO
    rules: o.RulesOption = o.DEFAULT_RULES
    out: PageOption = None
    explain: ExplainOption = None
    json: o.JsonOption = False
    quiet: o.QuietOption = False
    debug: o.DebugOption = False

    def again(self, pos: int = -1) -> o.QuestionOptions:
        """The same options for ``explain``, at a position."""
        names = {field.name for field in fields(_AgainOptions)}
        shared = {f.name: getattr(self, f.name) for f in fields(self) if f.name in names}
        return _AgainOptions(**shared, pos=pos)

    def require_consistent(self) -> None:
        """Refuse options that contradict each other, before any file is read.

        Raises:
            typer.BadParameter: They contradict each other.
        """
        self.again().require_consistent()
        if not self.answer:
            raise typer.BadParameter("Give the answer to list with --answer.")
        if self.explain is not None and self.out is None:
            raise typer.BadParameter("--explain goes with --out, the page that it is for.")


@o.takes_options
def tokens_command(options: TokensOptions) -> None:
    """List an answer token by token, to find where it went wrong.

    For each token of the answer: its rank and probability after the prompt and the tokens before
    it, the best other token, and Δℓ = logit(other) − logit(written), positive where the model
    prefers the other. Then the command that explains one of them.

    **--json** prints one object. *status* is "listed", with *version, model*; *answer* (for each
    token *pos, token, id, logit, rank* from 0, *logprob, probability, alternative, alternative_id,
    delta*: Δℓ); *row* (the token that *command* explains); *command, explained* (the rows that the
    page explains); *notes*. The logits at *pos* − 1 predict the token at *pos*.

    **--out** writes a page in which a click on a token opens its explanation.
    """
    options.require_consistent()
    shows_progress = not (options.quiet or options.json)
    output = Output(out=options.out, as_json=options.json, quiet=options.quiet)
    memory = MemoryOptions(options.memory.value, options.tile, None, options.attention.value)
    with exit_codes(options.debug):
        source = _Source.of(options)
        check_text(options.system, "system message")
        check_text(options.answer, "answer")
        output.check()
        name = options.model or options.adapter or ""
        remark = "" if is_local(name) else " (the first use downloads it)"
        with progress(f"Loading {name}{remark}", shows_progress):
            device = options.device.value if options.device else None
            loaded = load_model(options.model, device, options.dtype.value, options.adapter)
        model = loaded.bridge
        with quiet_libraries():
            before, after = _ids(model, options, source)
        _check_row(options.row, after.shape[1])
        found = _explained(model, options, before, after, memory, shows_progress)
        if found is None:
            listed = _listed(model, before.tokens, after, memory, shows_progress)
        else:
            listed = found.table
        row = _row(listed, options.row)
        command = _command(model, options, source.text, listed.to_dict("records")[row])
        notes = list(loaded.notes)
        if not options.chat and options.messages is None:
            notes += special_notes(model, source.text, options.prepend_bos)
        notes = [in_shell(note) for note in notes]
        explained: list[int] = []
        if found is not None and options.out is not None:
            write(options.out, found.save_html)
            explained = list(found.results)
        if options.json:
            print_json(
                {
                    "status": "listed",
                    "version": _version(),
                    "model": loaded.name,
                    "answer": candidate_rows(listed),
                    "row": row,
                    "command": command,
                    "explained": explained,
                    "notes": notes,
                }
            )
            return
        if not options.quiet:
            for note in notes:
                print_err(f"Note: {note}")
        _print(listed, row, command)
        if options.out is not None:
            print_out()
            print_out(
                f"Wrote {options.out}, which explains {len(explained)} of {len(listed)} tokens."
            )


@dataclass(frozen=True)
class _Source:
    """The prompt as it was given: a text, or the messages of a chat with its tools."""

    text: str
    messages: list[Any] | None
    tools: list[Any] | None

    @classmethod
    def of(cls, options: TokensOptions) -> _Source:
        """Read the files.

        Raises:
            CliError: A file cannot be read.
        """
        if options.messages is None:
            text = read_prompt(options.prompt, options.prompt_file, options.strip_newline)
            return cls(text, None, None)
        tools = None if options.tools is None else read_json(options.tools, "tools")
        return cls("", read_json(options.messages, "messages"), tools)


def _explained(
    model: Any,
    options: TokensOptions,
    before: Prompt,
    after: Tensor,
    memory: MemoryOptions,
    shows_progress: bool,
) -> AnswerExplanations | None:
    """The table with the explanations of the page; None where no page was asked for."""
    if options.out is None:
        return None
    from ..attribution.explain_answer import explain_answer
    from ..inputs.chat_prompt import ChatPrompt
    from ..inputs.tokens import str_tokens

    prompt: Tensor | ChatPrompt = before.tokens
    if before.segments:
        texts = str_tokens(model, before.tokens[0].tolist())
        prompt = ChatPrompt("".join(texts), before.tokens[0], before.segments, texts)
    with progress("Explaining the answer's tokens", shows_progress):
        return explain_answer(
            model, prompt, after, options.explain or 8, rules=options.rules.value,
            memory=memory.memory, tile=memory.tile, progress=False, attention=memory.attention,
        )  # fmt: skip


def _version() -> str:
    from .. import __version__

    return __version__


def _ids(model: Any, options: TokensOptions, source: _Source) -> tuple[Prompt, Tensor]:
    """The prompt, and the ids of the answer, as ``explain`` tokenises both.

    Raises:
        CliError: The answer changes the ids of the prompt, or has none.
    """

    def read(answer: str) -> Prompt:
        if source.messages is not None:
            return chat_ids(model, source.messages, source.tools, answer)
        return prompt_ids(
            model, source.text, chat=options.chat, system=options.system, answer=answer,
            prepend_bos=options.prepend_bos,
        )  # fmt: skip

    before, both = read(""), read(options.answer).tokens
    n = before.tokens.shape[1]
    if both.shape[1] <= n or both[0, :n].tolist() != before.tokens[0].tolist():
        raise CliError(Code.PROMPT, "The answer's tokens cannot be told from the prompt's.")
    return before, both[:, n:]


def _listed(
    model: Any, before: Tensor, after: Tensor, memory: MemoryOptions, shows_progress: bool
) -> pd.DataFrame:
    """The table, with a spinner where there is no bar over tiles."""
    from ..attribution.answer_table import answer_table
    from ..engine.fused import fused_blocks
    from ..engine.memory import plan_memory

    length = before.shape[1] + after.shape[1]
    fused = fused_blocks(model, memory.attention, length)
    plan = plan_memory(model, length, memory.memory, memory.tile, fused=fused)
    with progress("Reading the answer", shows_progress and plan.tile is None):
        return answer_table(
            model, before, after, memory=memory.memory, tile=memory.tile, progress=shows_progress,
            attention=memory.attention,
        )  # fmt: skip


def _check_row(row: int | None, n: int) -> None:
    """Refuse a row that the table will not have, before the model runs.

    Raises:
        CliError: The answer has no such token.
    """
    if row is not None and row >= n:
        raise CliError(Code.PROMPT, f"--row {row}: the answer has {n} tokens, counted from 0.")


def _row(listed: pd.DataFrame, row: int | None) -> int:
    """The row to explain: the one asked for, or that of the largest Δℓ."""
    return int(listed["delta"].to_numpy().argmax()) if row is None else row


def _command(model: Any, options: TokensOptions, text: str, row: Mapping[Any, Any]) -> str:
    """The command that explains one token; its target is the one that the model prefers."""
    written, other = (token_word(model, int(row[name])) for name in ("id", "alternative_id"))
    preferred = (other, written) if row["delta"] > 0 else (written, other)
    return retyped(
        "explain",
        options.again(int(row["pos"]) - 1),
        text,
        target=[preferred[0]],
        contrast=[preferred[1]],
    )


def _print(listed: pd.DataFrame, row: int, command: str) -> None:
    """Print the table, and the command for a row."""
    from ..inputs.token_text import printed

    columns = ("row", "pos", "token", "rank", "probability", "logit", "other", "Δℓ")
    rows = listed.to_dict("records")
    table(
        [(name, name not in ("token", "other")) for name in columns],
        [
            (
                str(i),
                str(one["pos"]),
                printed(one["token"], one["id"]),
                str(one["rank"]),
                f"{100 * one['probability']:.2f} %",
                f"{one['logit']:.3f}",
                printed(one["alternative"], one["alternative_id"]),
                f"{one['delta']:+.3f}",
            )
            for i, one in enumerate(rows)
        ],
    )
    print_out(
        "Δℓ = logit(other) − logit(token), other being the best other token: positive where the "
        "model prefers it."
    )
    print_out(f"To explain row {row} (or another: --row), type:")
    print_out()
    print_out(command)
