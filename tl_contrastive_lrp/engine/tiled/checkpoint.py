"""A folder that holds what a long run has finished, block by block, so that it can be resumed.

There is one safetensors file per block, with the gradient at its input and what was read in it.
Files are written whole or not at all. A folder belongs to one run (prompt, objective and its value,
rules, settings); results of another run are refused, never mixed in.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ...errors import Argument, FileFormatError, Message
from ...files import atomic_path
from ...rules.precision import LOW
from ..memory import MemoryPlan
from .tiles import BackwardState, laid_out

_FORMAT = "tl_contrastive_lrp.checkpoint 2"


_PARTS = ("target", "contrast")


def folder_of_part(directory: str | os.PathLike[str], part: str) -> Path:
    """The folder of one of the two runs that explain two answers.

    Args:
        directory: The folder for both; created if its parent exists.
        part: "target" or "contrast".

    Raises:
        FileNotFoundError: the folder's parent does not exist.
        FileFormatError: the folder holds something else.
    """
    path = Path(directory)
    path.mkdir(exist_ok=True)
    foreign = sorted(p.name for p in path.iterdir() if p.name not in _PARTS)
    if foreign:
        raise FileFormatError(
            Message(
                f"{path} holds other files, such as {foreign[0]}; give ",
                Argument("checkpoint_dir"),
                " a folder of its own.",
            )
        )
    return path / part


class Restorable(Protocol):
    """A reader whose results for a block can be saved and restored."""

    def saved(self, layer: int, which: int) -> dict[str, Tensor]:
        """What was read of a finished block for objective ``which``."""
        ...

    def restore(self, layer: int, which: int, tensors: dict[str, Tensor]) -> None:
        """Take back what ``saved`` gave."""
        ...


class Checkpoint:
    """One run's folder of finished blocks.

    Args:
        directory: The folder; created if its parent exists.
        settings: What the results depend on besides prompt, objectives and rules, in words.

    Raises:
        FileNotFoundError: the folder's parent does not exist.
        FileFormatError: the folder holds something else.
    """

    def __init__(self, directory: str | os.PathLike[str], settings: str = "") -> None:
        self.path = Path(directory)
        self.settings = settings
        self.path.mkdir(exist_ok=True)
        self._note = self.path / "question.json"
        foreign = [p.name for p in self.path.iterdir() if not _is_ours(p.name)]
        if foreign:
            raise FileFormatError(
                Message(
                    f"{self.path} holds other files, such as {sorted(foreign)[0]}; give ",
                    Argument("checkpoint_dir"),
                    " a folder of its own.",
                )
            )

    def tile(self) -> int | None:
        """Positions per tile of the run that was begun here; None if none was."""
        note = self._read()
        return None if note is None else int(note["tile"])

    def _read(self) -> dict[str, Any] | None:
        if not self._note.exists():
            return None
        try:
            note = json.loads(self._note.read_text(encoding="utf-8"))
            if note["format"] != _FORMAT or int(note["tile"]) < 1 or not note["values"]:
                raise ValueError
            return dict(note)
        except (ValueError, KeyError, TypeError) as error:
            raise FileFormatError(
                f"{self._note} is damaged or of another version; delete the folder to start over."
            ) from error

    def open(
        self, tokens: Tensor, values: Sequence[Tensor], rules: str, names: Sequence[str], tile: int,
        *, fused: bool = False,
    ) -> None:  # fmt: skip
        """Begin a run, or confirm that this is the run that was begun here.

        Args:
            tokens: The prompt.
            values: The value of each objective.
            rules: Name of the rule set.
            names: A description of each objective.
            tile: Positions per tile. Blocks finished with another tile still count.
            fused: Whether attention is fused where it can be.

        Raises:
            FileFormatError: the folder belongs to another run.
        """
        digest = hashlib.sha256(tokens.cpu().numpy().tobytes())
        dtypes = [str(value.dtype) for value in values]
        settings = f"{self.settings}, fused attention" if fused else self.settings
        digest.update("\n".join((rules, *names, *dtypes, settings)).encode())
        question = digest.hexdigest()
        deltas = [float(value.detach()) for value in values]  # these identify the model
        begun = self._read()
        if begun is not None and not (
            begun["question"] == question
            and (
                begun["values"] == deltas
                if begun["tile"] == tile
                else _close(begun["values"], deltas, values[0].dtype)
            )
        ):
            raise FileFormatError(
                Message(
                    f"{self.path} belongs to another run (prompt, model, objective, rules, "
                    "attention or other settings differ, or the processor or number of threads, "
                    "which round differently). Give another ",
                    Argument("checkpoint_dir"),
                    ", or delete that folder.",
                )
            )
        if begun is None or begun["tile"] != tile:
            note = {"format": _FORMAT, "question": question, "values": deltas, "tile": tile}
            with atomic_path(self._note, self._note.with_suffix(".part")) as partial:
                partial.write_text(json.dumps(note), encoding="utf-8")

    def _file(self, layer: int) -> Path:
        return self.path / f"block_{layer}.safetensors"

    def write(
        self, layer: int, signals: Sequence[BackwardState], reader: Restorable | None
    ) -> None:
        """Save what block ``layer`` gave for each objective."""
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        for which, signal in enumerate(signals):
            tensors[f"{which}|g"] = signal.g
            for name, x in signal.read.sums.items():
                if name.startswith(f"blocks.{layer}."):
                    tensors[f"{which}|sum|{name}"] = x
            if reader is not None:
                for name, x in reader.saved(layer, which).items():
                    tensors[f"{which}|edge|{name}"] = x
        file = self._file(layer)
        with atomic_path(file, file.with_suffix(".part")) as partial:
            save_file(
                {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()},
                partial,
            )

    def resume(
        self, n_layers: int, signals: Sequence[BackwardState], reader: Restorable | None
    ) -> int:
        """Restore what was finished.

        Returns:
            The lowest finished block; the blocks below it are still to do.

        Raises:
            FileFormatError: a file that cannot be read.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        first = n_layers
        while first and self._file(first - 1).exists():
            first -= 1
            try:
                tensors = {k: laid_out(x) for k, x in load_file(self._file(first)).items()}
                gradients = [tensors.pop(f"{which}|g") for which in range(len(signals))]
            except (SafetensorError, KeyError, OSError) as error:
                raise FileFormatError(f"{self._file(first)} is damaged; delete it.") from error
            edges: list[dict[str, Tensor]] = [{} for _ in signals]
            for key, tensor in tensors.items():
                which, kind, name = key.split("|", 2)
                if kind == "edge":
                    edges[int(which)][name] = tensor
                else:
                    signals[int(which)].read.sums[name] = tensor
            for which_, (signal, g) in enumerate(zip(signals, gradients, strict=True)):
                signal.g = laid_out(g, signal.g)
                if reader is not None:
                    reader.restore(first, which_, edges[which_])
        return first


def _close(before: list[float], now: list[float], dtype: torch.dtype) -> bool:
    """Equal up to the rounding that another tile size causes."""
    slack = 0.05 if dtype in LOW else 1e-3
    return all(abs(x - y) <= slack * max(1.0, abs(x)) for x, y in zip(before, now, strict=True))


def checkpoint_of(
    directory: str | os.PathLike[str] | None, settings: str, plan: MemoryPlan
) -> tuple[Checkpoint | None, int]:
    """The checkpoint, if a folder is given, and the positions per tile of the run begun there.

    With the tile of that run, a resumed run gives the same bits even if the device now has more or
    less memory free. A tile that the user gives takes precedence.

    Raises:
        FileNotFoundError, FileFormatError: as ``Checkpoint``.
    """
    assert plan.tile is not None
    if directory is None:
        return None, plan.tile
    checkpoint = Checkpoint(directory, settings)
    begun = None if plan.given else checkpoint.tile()
    return checkpoint, begun or plan.tile


def _is_ours(name: str) -> bool:
    return name in ("question.json", "question.part") or (
        name.startswith("block_") and name.endswith((".safetensors", ".part"))
    )
