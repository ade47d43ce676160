"""Options and help texts that the commands share."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

EXIT_CODES = """Exit codes:

- 0 done

- 1 unexpected error (--debug shows where)

- 2 options that make no sense

- 3 the model cannot be loaded, or has a part that no rule covers

- 4 the prompt or a token is no good, or no --contrast was given and the candidates are listed

- 5 a file cannot be read or written

- 130 interrupted"""


class Rules(str, Enum):
    """Names of the rule sets; spelled out here because ``rulesets`` needs torch."""

    ATTNLRP = "attnlrp"
    CPLRP = "cplrp"
    RELP = "relp"
    GIM = "gim"
    GRADIENT = "gradient"


class Device(str, Enum):
    CPU = "cpu"
    CUDA = "cuda"


class Dtype(str, Enum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT64 = "float64"


class Kind(str, Enum):
    FORMAT = "format"
    ARITHMETIC = "arithmetic"
    CODE = "code"
    TOOL = "tool"


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
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress and no notes on stderr.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
