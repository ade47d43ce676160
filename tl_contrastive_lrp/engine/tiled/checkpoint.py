"""A folder that holds what a long run has finished, block by block, so that it can go on.

One safetensors file a block: the gradient at its input and what was read in it. Files are written
whole or not at all. A folder belongs to one question (prompt, model's answer, objective, rules,
settings); another one is refused, never mixed in.
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
from .accumulate import BackwardState, laid_out

_FORMAT = "tl_contrastive_lrp.checkpoint 2"


class Restorable(Protocol):
    """A reader whose results of a block can be kept and put back."""

    def saved(self, layer: int, which: int) -> dict[str, Tensor]: ...

    def restore(self, layer: int, which: int, tensors: dict[str, Tensor]) -> None: ...


class Checkpoint:
    """See the module.

    Args:
        directory: The folder; made if its parent exists.
        settings: What else the results depend on, in words.

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
        """Positions a tile in the run that was begun here."""
        found = self._read()
        return None if found is None else int(found["tile"])

    def _read(self) -> dict[str, Any] | None:
        if not self._note.exists():
            return None
        try:
            found = json.loads(self._note.read_text(encoding="utf-8"))
            if found["format"] != _FORMAT or int(found["tile"]) < 1 or not found["values"]:
                raise ValueError
            return dict(found)
        except (ValueError, KeyError, TypeError) as error:
            raise FileFormatError(
                f"{self._note} is damaged or of another version; delete the folder to start anew."
            ) from error

    def open(
        self, tokens: Tensor, values: Sequence[Tensor], rules: str, names: Sequence[str], tile: int
    ) -> None:
        """Begin, or find out that this is the run that was begun here.

        Args:
            tokens, rules: What was asked.
            values, names: Of its objectives.
            tile: Positions a tile. Blocks that were finished in others count all the same.

        Raises:
            FileFormatError: the folder belongs to another run.
        """
        digest = hashlib.sha256(tokens.cpu().numpy().tobytes())
        dtypes = [str(value.dtype) for value in values]
        digest.update("\n".join((rules, *names, *dtypes, self.settings)).encode())
        question = digest.hexdigest()
        said = [float(value.detach()) for value in values]  # tells which model it is
        found = self._read()
        if found is not None and not (
            found["question"] == question
            and (
                found["values"] == said
                if found["tile"] == tile
                else _close(found["values"], said, values[0].dtype)
            )
        ):
            raise FileFormatError(
                Message(
                    f"{self.path} belongs to another run (prompt, model, objective, rules or "
                    "settings differ, or the processor or number of threads, which round "
                    "differently). Give another ",
                    Argument("checkpoint_dir"),
                    ", or delete that folder.",
                )
            )
        if found is None or found["tile"] != tile:
            note = {"format": _FORMAT, "question": question, "values": said, "tile": tile}
            with atomic_path(self._note, self._note.with_suffix(".part")) as partial:
                partial.write_text(json.dumps(note), encoding="utf-8")

    def _file(self, layer: int) -> Path:
        return self.path / f"block_{layer}.safetensors"

    def write(
        self, layer: int, signals: Sequence[BackwardState], reader: Restorable | None
    ) -> None:
        """Keep what block ``layer`` gave, by objective."""
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        for which, signal in enumerate(signals):
            tensors[f"{which}|g"] = signal.g
            for name, x in signal.joined.kept.items():
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
        """Put back what was finished.

        Returns:
            The lowest block that is finished: those below it are still to do.

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
                found = [tensors.pop(f"{which}|g") for which in range(len(signals))]
            except (SafetensorError, KeyError, OSError) as error:
                raise FileFormatError(f"{self._file(first)} is damaged; delete it.") from error
            edges: list[dict[str, Tensor]] = [{} for _ in signals]
            for key, tensor in tensors.items():
                which, kind, name = key.split("|", 2)
                if kind == "edge":
                    edges[int(which)][name] = tensor
                else:
                    signals[int(which)].joined.kept[name] = tensor
            for which_, (signal, g) in enumerate(zip(signals, found, strict=True)):
                signal.g = laid_out(g, signal.g)
                if reader is not None:
                    reader.restore(first, which_, edges[which_])
        return first


def _close(before: list[float], now: list[float], dtype: torch.dtype) -> bool:
    """The same but for the rounding that other tiles bring."""
    slack = 0.05 if dtype in LOW else 1e-3
    return all(abs(x - y) <= slack * max(1.0, abs(x)) for x, y in zip(before, now, strict=True))


def checkpoint_of(
    directory: str | os.PathLike[str] | None, settings: str, choice: MemoryPlan
) -> tuple[Checkpoint | None, int]:
    """The checkpoint, if one is wanted, and positions a tile: those of the run begun there.

    Then it goes on with the same bits even if the device has more or less memory free by now; a
    tile that the user gives is taken all the same.

    Raises:
        FileNotFoundError, FileFormatError: as ``Checkpoint``.
    """
    assert choice.tile is not None
    if directory is None:
        return None, choice.tile
    checkpoint = Checkpoint(directory, settings)
    begun = None if choice.given else checkpoint.tile()
    return checkpoint, begun or choice.tile


def _is_ours(name: str) -> bool:
    return name in ("question.json", "question.part") or (
        name.startswith("block_") and name.endswith((".safetensors", ".part"))
    )
