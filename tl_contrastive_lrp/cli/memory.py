"""How much memory a run may take: the options, the plan, and resuming a run after Ctrl-C.

A tiled run keeps its finished blocks below ``--checkpoint-dir``. Each kind of run has a folder of
its own there, because such a folder belongs to one question.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .errors import CliError, Code
from .output import Output, check_parent
from .terminal import print_err

if TYPE_CHECKING:
    from ..engine.fused import AttentionKind
    from ..engine.memory import Memory, MemoryPlan


@dataclass(frozen=True)
class MemoryOptions:
    """The options ``--memory``, ``--tile``, ``--checkpoint-dir`` and ``--attention``.

    Raises:
        typer.BadParameter: They contradict each other.
    """

    memory: Memory = "auto"
    tile: int | None = None
    checkpoint_dir: Path | None = None
    attention: AttentionKind = "auto"

    def __post_init__(self) -> None:
        if self.memory != "plain":
            return
        for option, value in (("--tile", self.tile), ("--checkpoint-dir", self.checkpoint_dir)):
            if value is not None:
                raise typer.BadParameter(
                    f"{option} is for tiles: it does not go with --memory plain."
                )

    def check(self) -> None:
        """Refuse a checkpoint folder that cannot be created, before a model is loaded.

        Raises:
            CliError: The folder cannot be made.
        """
        if self.checkpoint_dir is None:
            return
        if self.checkpoint_dir.exists() and not self.checkpoint_dir.is_dir():
            raise CliError(Code.FILE, f"--checkpoint-dir {self.checkpoint_dir} is a file.")
        check_parent(self.checkpoint_dir, "--checkpoint-dir")

    def plan(
        self,
        model: Any,
        length: int,
        kind: str,
        *,
        why_plain: str = "",
        graphs: int = 0,
        by_head: bool = False,
        pruned: bool = False,
    ) -> RunPlan:
        """Decide how one run uses memory.

        Args:
            model: The bridge.
            length: Tokens of the prompt.
            kind: Name of the run's folder below ``checkpoint_dir``.
            why_plain: Why the run cannot be tiled, if that is known in advance.
            graphs: The number of objectives for which edges are computed too.
            by_head: Whether these edges are split by head and path.
            pruned: Whether only the largest edges are kept.

        Raises:
            FileFormatError: The folder holds something else.
            ModelStateError: The run cannot be tiled, and otherwise does not fit into memory.
        """
        from ..engine.fused import fused_blocks
        from ..engine.memory import plan_memory, require_plain_fits

        options, folder = self, None if self.checkpoint_dir is None else self.checkpoint_dir / kind
        if folder is not None and folder.is_dir():
            from ..engine.tiled.checkpoint import Checkpoint

            # A run begun in tiles is finished in these tiles, even if it would now fit without.
            if (begun := Checkpoint(folder).tile()) is not None:
                options = replace(self, memory="tiled", tile=self.tile or begun)
        plan = plan_memory(
            model, length, options.memory, options.tile, graphs=graphs, by_head=by_head,
            pruned=pruned, fused=fused_blocks(model, self.attention, length),
        )  # fmt: skip
        if why_plain and plan.tile is not None:
            plan = require_plain_fits(plan, why_plain)
        if plan.tile is None:
            folder = None
        return RunPlan(options, plan, folder)


@dataclass(frozen=True)
class RunPlan:
    """How one run uses memory.

    Attributes:
        options: The user's options.
        plan: The engine's plan, and its estimates.
        folder: The folder for finished blocks, if they are saved.
    """

    options: MemoryOptions
    plan: MemoryPlan
    folder: Path | None

    @property
    def is_tiled(self) -> bool:
        """Whether the run is tiled."""
        return self.plan.tile is not None

    def described(self, done: str | None = None, attention: str = "eager") -> str:
        """Describe the use of memory where that is of interest: tiles, or an explicit option.

        Args:
            done: What was actually done; a GPU without enough memory may have halved the tiles.
            attention: How attention was computed.
        """
        if not self.is_tiled and self.options.memory == "auto":
            return ""
        from ..engine.memory import gib

        need, free = gib(self.plan.plain_bytes), gib(self.plan.free_bytes)
        how = "" if attention == "eager" else f", attention {attention}"
        return (
            f"Memory: {done or self.plan.memory}{how}; the plain engine needs about {need}, "
            f"{free} are free."
        )

    @property
    def note(self) -> str:
        """A note on what the user may not expect, or ""."""
        if self.is_tiled or self.options.checkpoint_dir is None:
            return ""
        return (
            "The run fits into memory without tiles, so it keeps nothing in --checkpoint-dir; with "
            "--memory tiled it would."
        )

    def announce(self, output: Output) -> None:
        """Print the plan on stderr, before a run that may take long."""
        if output.shows_progress and (description := self.described()):
            print_err(description)
        if not output.quiet and self.note:
            print_err(f"Note: {self.note}")

    def arguments(self) -> dict[str, Any]:
        """The arguments of ``attribute`` and ``attribution_graph``; makes the folder's parent."""
        if self.folder is not None:
            self.folder.parent.mkdir(exist_ok=True)
        return {
            "memory": self.options.memory,
            "tile": self.options.tile,
            "checkpoint_dir": self.folder,
        }

    def as_json(self, done: str) -> dict[str, Any]:
        """What was actually done, and the estimates in bytes."""
        return {
            "way": done,
            "plain_bytes": self.plan.plain_bytes,
            "free_bytes": self.plan.free_bytes,
        }

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """On Ctrl-C, print which blocks are saved and how to resume."""
        try:
            yield
        except KeyboardInterrupt:
            if self.folder is not None:
                finished = len(list(self.folder.glob("block_*.safetensors")))
                print_err(
                    f"Finished blocks ({finished}) are kept in {self.folder}: the same command "
                    "goes on from there."
                )
            elif self.is_tiled:
                print_err(
                    "Nothing is kept. With --checkpoint-dir FOLDER, a stopped run can be resumed."
                )
            raise
