"""How much memory a run may take: what was typed, what comes of it, and how to go on after Ctrl-C.

A run in tiles keeps what is finished below ``--checkpoint-dir``, each kind of run in a folder of
its own, because such a folder belongs to one question.
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
    from ..engine.memory import Memory, MemoryPlan


@dataclass(frozen=True)
class MemoryOptions:
    """The options ``--memory``, ``--tile`` and ``--checkpoint-dir``."""

    memory: Memory = "auto"
    tile: int | None = None
    checkpoint_dir: Path | None = None

    @classmethod
    def typed(cls, options: dict[str, Any]) -> MemoryOptions:
        """Of the options of a command.

        Raises:
            typer.BadParameter: they contradict each other.
        """
        way = cls(options["memory"].value, options["tile"], options["checkpoint_dir"])
        for name, value in (("--tile", way.tile), ("--checkpoint-dir", way.checkpoint_dir)):
            if way.memory == "plain" and value is not None:
                raise typer.BadParameter(
                    f"{name} is for tiles: it does not go with --memory plain."
                )
        return way

    def check(self) -> None:
        """Refuse a folder that cannot be made, before the model is loaded for nothing.

        Raises:
            CliError: it cannot.
        """
        if self.checkpoint_dir is None:
            return
        if self.checkpoint_dir.exists() and not self.checkpoint_dir.is_dir():
            raise CliError(Code.FILE, f"--checkpoint-dir {self.checkpoint_dir} is a file.")
        check_parent(self.checkpoint_dir, "--checkpoint-dir")

    def run(
        self, model: Any, length: int, kind: str, *, plain_only: str = "", **graph: Any
    ) -> RunPlan:
        """What one run is told, and what it will do.

        Args:
            model: The bridge.
            length: Tokens of the prompt.
            kind: Name of its folder below ``checkpoint_dir``.
            plain_only: Why it cannot run in tiles, if it is known.
            graph: What is estimated beside nodes, as for ``memory.choose``.

        Raises:
            FileFormatError: the folder holds something else.
            ModelStateError: only the plain way is possible, and it does not fit.
        """
        from ..engine.memory import choose, require_plain_fits

        way, folder = self, None if self.checkpoint_dir is None else self.checkpoint_dir / kind
        if folder is not None and folder.is_dir():
            from ..engine.tiled.checkpoint import Checkpoint

            # What was begun in tiles goes on in these, even if the plain way fits by now.
            if (begun := Checkpoint(folder).tile()) is not None:
                way = replace(way, memory="tiled", tile=way.tile or begun)
        choice = choose(model, length, way.memory, way.tile, **graph)
        if plain_only and choice.tile is not None:
            choice = require_plain_fits(choice, plain_only)
        if choice.tile is None:
            folder = None
        return RunPlan(way, choice, folder)


@dataclass(frozen=True)
class RunPlan:
    """One run: the options, what is estimated and chosen, and its folder if it keeps one."""

    way: MemoryOptions
    choice: MemoryPlan
    folder: Path | None

    @property
    def tiles(self) -> bool:
        return self.choice.tile is not None

    def said(self, done: str | None = None) -> str:
        """What was chosen, where that is of interest: tiles, or a way that was asked for.

        Args:
            done: What came of it: a GPU that was full may have made tiles smaller.
        """
        if not self.tiles and self.way.memory == "auto":
            return ""
        from ..engine.memory import gib

        need, free = gib(self.choice.plain_bytes), gib(self.choice.free_bytes)
        return (
            f"Memory: {done or self.choice.memory}; the plain way needs about {need}, {free} are "
            "free."
        )

    @property
    def note(self) -> str:
        """What may have been meant otherwise."""
        if self.tiles or self.way.checkpoint_dir is None:
            return ""
        return (
            "The plain way fits into memory. It keeps nothing in --checkpoint-dir; --memory tiled "
            "would."
        )

    def announce(self, output: Output) -> None:
        """Say on stderr, before a run that may take long, what was chosen."""
        if output.spins and (said := self.said()):
            print_err(said)
        if not output.quiet and self.note:
            print_err(f"Note: {self.note}")

    def options(self) -> dict[str, Any]:
        """For ``attribute`` and ``attribution_graph``; makes the folder's parent."""
        if self.folder is not None:
            self.folder.parent.mkdir(exist_ok=True)
        return {
            "memory": self.way.memory,
            "tile": self.way.tile,
            "checkpoint_dir": self.folder,
        }

    def as_json(self, done: str) -> dict[str, Any]:
        """What is told: how it was done in the end, and the estimate in bytes."""
        return {
            "way": done,
            "plain_bytes": self.choice.plain_bytes,
            "free_bytes": self.choice.free_bytes,
        }

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Say on Ctrl-C what is kept and how to go on."""
        try:
            yield
        except KeyboardInterrupt:
            if self.folder is not None:
                done = len(list(self.folder.glob("block_*.safetensors")))
                print_err(
                    f"Finished blocks ({done}) are kept in {self.folder}: the same command goes on "
                    "from there."
                )
            elif self.tiles:
                print_err(
                    "Nothing is kept. With --checkpoint-dir FOLDER a run can be taken up again."
                )
            raise
