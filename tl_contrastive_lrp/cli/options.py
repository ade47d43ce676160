"""The options that the commands share, their help texts, and commands made of dataclasses.

The dataclasses of options have neither ``__eq__`` nor ``__repr__``: nothing uses them, and
generating them would delay ``--help``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

OptionsT = TypeVar("OptionsT")

EXIT_CODES = """Exit codes:

- 0 done

- 1 unexpected error (--debug shows where)

- 2 invalid options

- 3 the model cannot be loaded, has a part that no rule covers, or fails a check

- 4 the prompt or a token cannot be used, or no --contrast was given and the candidates are listed

- 5 a file cannot be read or written

- 130 interrupted"""


class Rules(str, Enum):
    """Names of the rule sets; written out here because ``rules.rule_sets`` imports torch."""

    ATTNLRP = "attnlrp"
    CPLRP = "cplrp"
    RELP = "relp"
    GIM = "gim"
    GRADIENT = "gradient"


DEFAULT_RULES = Rules.ATTNLRP  # as in ``rules.rule_sets``


class Device(str, Enum):
    """Devices that a model can be loaded on."""

    CPU = "cpu"
    CUDA = "cuda"
    MPS = "mps"


class Dtype(str, Enum):
    """Floating-point types of weights and activations."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT64 = "float64"


class Kind(str, Enum):
    """Kinds of task in the demo."""

    FORMAT = "format"
    ARITHMETIC = "arithmetic"
    CODE = "code"
    TOOL = "tool"


class Granularity(str, Enum):
    """How finely a graph divides a block."""

    BLOCK = "block"
    SUBLAYER = "sublayer"


class Memory(str, Enum):
    """How memory may be used; written out here because ``engine.memory`` imports torch."""

    AUTO = "auto"
    PLAIN = "plain"
    TILED = "tiled"


class Attention(str, Enum):
    """How attention is computed; written out here because ``engine.fused`` imports torch."""

    AUTO = "auto"
    FUSED = "fused"
    EAGER = "eager"


ModelOption = Annotated[
    str | None,
    typer.Option(
        help="Folder of a Hugging Face model, its name on the hub, or a GGUF file (which is "
        "dequantised). Needed, except with --adapter."
    ),
]
AdapterOption = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        help="Folder of a PEFT adapter (LoRA), to be merged into the model. Without --model into "
        "the one that it names itself.",
    ),
]
PromptOption = Annotated[str | None, typer.Option(help="The text that the model continued.")]
PromptFileOption = Annotated[
    str | None,
    typer.Option(help="Read the prompt from a UTF-8 file, unchanged; - is stdin."),
]
StripNewlineOption = Annotated[
    bool, typer.Option("--strip-newline", help="Drop the file's last newline.")
]
ChatOption = Annotated[
    bool,
    typer.Option("--chat", help="The prompt is a user's message: apply the chat template."),
]
SystemOption = Annotated[str | None, typer.Option(help="System message, with --chat.")]
MessagesOption = Annotated[
    Path | None,
    typer.Option(
        metavar="CHAT.JSON",
        help="The prompt is a chat: a JSON file with a list of messages, each with role and "
        "content (or tool_calls), as Hugging Face has them. Relevance is given by message too.",
    ),
]
ToolsOption = Annotated[
    Path | None,
    typer.Option(
        metavar="TOOLS.JSON",
        help="Tools that the model may call, with --messages: a JSON file with a list of schemas.",
    ),
]
AnswerOption = Annotated[
    str,
    typer.Option(
        help="What the assistant (or, without --chat or --messages, the model) has written so far "
        "after the prompt. --pos may lie in it."
    ),
]
PrependBosOption = Annotated[
    bool | None,
    typer.Option(
        "--bos/--no-bos",
        help="Whether the prompt begins with the BOS token. Default: as TransformerLens has it for "
        "the model, but never a second one.",
        show_default=False,
    ),
]
TargetOption = Annotated[
    list[str] | None,
    typer.Option(
        help="The token the model preferred, as text (a leading space counts) or as id:123. "
        "Repeat for a set, which counts as its mean. Default: the model's top token."
    ),
]
ContrastOption = Annotated[
    list[str] | None,
    typer.Option(
        help="The token it should have preferred, likewise. Without it, candidates are listed."
    ),
]
PosOption = Annotated[
    int, typer.Option(help="Explain the token after this position (-1: the last).")
]
DeviceOption = Annotated[
    Device | None,
    typer.Option(help="mps is Apple's GPU. Default: cuda where there is one, else cpu."),
]
DtypeOption = Annotated[Dtype, typer.Option(help="Of weights and activations.")]
RulesOption = Annotated[Rules, typer.Option(help="How relevance passes each operation.")]
TopOption = Annotated[int, typer.Option(min=1, help="How many tokens the table shows.")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="One JSON object on stdout and nothing else.")
]
OutOption = Annotated[
    Path | None,
    typer.Option(help="Write a page (HTML) that opens from disk, without network."),
]
SaveOption = Annotated[
    Path | None,
    typer.Option(help="Write the whole result (safetensors); Attribution.load reads it."),
]
MemoryOption = Annotated[
    Memory,
    typer.Option(
        help="plain: every block's attention at once. tiled: block by block and tile by tile, in "
        "memory linear in the prompt. auto: tiled where plain would not fit."
    ),
]
TileOption = Annotated[
    int | None, typer.Option(min=1, help="Tokens per tile. Default: as many as fit into memory.")
]
AttentionOption = Annotated[
    Attention,
    typer.Option(
        help="eager: as TransformerLens computes it, bit for bit. fused: torch's fused attention, "
        "equal up to rounding, in each block where nothing needs the scores or the pattern, as a "
        "graph does. auto: fused where it is faster."
    ),
]
CheckpointDirOption = Annotated[
    Path | None,
    typer.Option(
        help="Save finished blocks here, so that an interrupted run in tiles is resumed when the "
        "same command is typed again."
    ),
]
NoGraphOption = Annotated[
    bool,
    typer.Option(
        "--no-graph",
        help="Leave the attribution graph out of the page. Above 2,000 tokens it has at most 2,000 "
        "edges per transition.",
    ),
]
CheckOption = Annotated[
    bool,
    typer.Option(
        "--check",
        help="Replace the 16 tokens of largest relevance and 16 random ones, one at a time, and "
        "say whether what that does to Δℓ supports the relevance. About 30 forwards more.",
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress and no notes on stderr.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@dataclass(frozen=True, eq=False, repr=False)
class QuestionOptions:
    """The options of the question to explain, which ``explain`` and ``graph`` share."""

    model: ModelOption = None
    adapter: AdapterOption = None
    prompt: PromptOption = None
    prompt_file: PromptFileOption = None
    strip_newline: StripNewlineOption = False
    chat: ChatOption = False
    system: SystemOption = None
    messages: MessagesOption = None
    tools: ToolsOption = None
    answer: AnswerOption = ""
    prepend_bos: PrependBosOption = None
    target: TargetOption = None
    contrast: ContrastOption = None
    pos: PosOption = -1
    rules: RulesOption = DEFAULT_RULES
    device: DeviceOption = None
    dtype: DtypeOption = Dtype.FLOAT32

    def require_consistent(self) -> None:
        """Refuse options that contradict each other, before any file is read.

        Raises:
            typer.BadParameter: They contradict each other.
        """
        if self.model is None and self.adapter is None:
            raise typer.BadParameter("Missing option '--model'.")
        if [self.prompt, self.prompt_file, self.messages].count(None) != 2:
            raise typer.BadParameter(
                "Give the prompt with either --prompt or --prompt-file, or a chat with --messages."
            )
        if self.chat and self.messages is not None:
            raise typer.BadParameter(
                "--chat makes a message of a prompt, and --messages has messages: leave out --chat."
            )
        if not self.chat and self.system is not None:
            raise typer.BadParameter(
                "A system message can only go with --chat; a chat of --messages has its own."
            )
        if self.tools is not None and self.messages is None:
            raise typer.BadParameter("--tools goes with --messages.")
        if (self.chat or self.messages is not None) and self.prepend_bos is not None:
            raise typer.BadParameter(
                "--bos and --no-bos are for a prompt without --chat or --messages: the chat "
                "template decides whether it begins with the BOS token."
            )


def takes_options(run: Callable[[OptionsT], None]) -> Callable[..., None]:
    """Turn a function of one dataclass of options into a function that Typer can read.

    Typer makes an option of each parameter. The function returned has one for each field of the
    dataclass, in the same order, with the field's annotation and default.

    Args:
        run: Function with the single parameter ``options``; its docstring becomes the help text.
    """
    kind = get_type_hints(run)["options"]
    hints = get_type_hints(kind, include_extras=True)

    def command(**values: Any) -> None:
        run(kind(**values))

    parameters = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=hints[field.name],
        )
        for field in fields(kind)
    ]
    vars(command).update(__signature__=inspect.Signature(parameters))
    command.__annotations__ = {**hints, "return": None}
    command.__doc__, command.__name__ = run.__doc__, run.__name__
    return command
