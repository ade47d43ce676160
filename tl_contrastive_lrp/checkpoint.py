"""A folder that holds what a long run has finished, block by block, so that it can go on.

One safetensors file a block: the gradient at its input and what was read in it. Files are written
whole or not at all. A folder belongs to one question (prompt, model's answer, objective, rules,
settings); another one is refused, never mixed in.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from .errors import FileFormatError

_FORMAT = "tl_contrastive_lrp.checkpoint 1"


class Restorable(Protocol):
    """A reader whose results of a block can be kept and put back."""

    def saved(self, layer: int) -> dict[str, Tensor]: ...

    def restore(self, layer: int, tensors: dict[str, Tensor]) -> None: ...


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
                f"{self.path} holds other files, such as {sorted(foreign)[0]}; give checkpoint_dir "
                "a folder of its own."
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
            if found["format"] != _FORMAT or int(found["tile"]) < 1:
                raise ValueError
            return dict(found)
        except (ValueError, KeyError, TypeError) as error:
            raise FileFormatError(
                f"{self._note} is damaged or of another version; delete the folder to start anew."
            ) from error

    def open(self, tokens: Tensor, value: Tensor, rules: str, objective: str, tile: int) -> None:
        """Begin, or find out that this is the run that was begun here.

        Raises:
            FileFormatError: the folder belongs to another run.
        """
        digest = hashlib.sha256(tokens.cpu().numpy().tobytes())
        digest.update(repr((float(value.detach()), str(value.dtype))).encode())
        digest.update("\n".join((rules, objective, self.settings)).encode())
        question = digest.hexdigest()
        found = self._read()
        if found is not None and found["question"] != question:
            raise FileFormatError(
                f"{self.path} belongs to another run (prompt, model, objective, rules or settings "
                "differ). Give another checkpoint_dir, or delete that folder."
            )
        if found is None or found["tile"] != tile:  # a smaller tile starts anew
            for path in self.path.glob("block_*.safetensors"):
                path.unlink()
            note = {"format": _FORMAT, "question": question, "tile": tile}
            partial = self._note.with_suffix(".part")
            partial.write_text(json.dumps(note), encoding="utf-8")
            os.replace(partial, self._note)

    def _file(self, layer: int) -> Path:
        return self.path / f"block_{layer}.safetensors"

    def write(
        self, layer: int, g: Tensor, parts: dict[str, dict[int, Tensor]], reader: Restorable | None
    ) -> None:
        """Keep what block ``layer`` gave."""
        from safetensors.torch import save_file

        tensors = {"g": g.contiguous()}
        for name, tiles in parts.items():
            if name.startswith(f"blocks.{layer}."):
                tensors |= {f"sum|{name}|{t}": x.contiguous() for t, x in tiles.items()}
        if reader is not None:
            tensors |= {f"edge|{name}": x.contiguous() for name, x in reader.saved(layer).items()}
        partial = self._file(layer).with_suffix(".part")
        save_file({name: x.detach().cpu().clone() for name, x in tensors.items()}, partial)
        os.replace(partial, self._file(layer))

    def resume(
        self,
        n_layers: int,
        g: Tensor,
        parts: dict[str, dict[int, Tensor]],
        reader: Restorable | None,
    ) -> tuple[int, Tensor]:
        """Put back what was finished.

        Returns:
            The lowest block that is finished, and the gradient at its input.

        Raises:
            FileFormatError: a file that cannot be read.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        first = n_layers
        while first and self._file(first - 1).exists():
            try:
                tensors = load_file(self._file(first - 1))
                like, g = g, tensors.pop("g")
            except (SafetensorError, KeyError, OSError) as error:
                raise FileFormatError(f"{self._file(first - 1)} is damaged; delete it.") from error
            g = g.to(like.device)
            edges: dict[str, Tensor] = {}
            for key, tensor in tensors.items():
                kind, _, rest = key.partition("|")
                if kind == "edge":
                    edges[rest] = tensor
                else:
                    name, _, tile = rest.rpartition("|")
                    parts.setdefault(name, {})[int(tile)] = tensor
            if reader is not None:
                reader.restore(first - 1, edges)
            first -= 1
        return first, g


def _is_ours(name: str) -> bool:
    return name in ("question.json", "question.part") or (
        name.startswith("block_") and name.endswith((".safetensors", ".part"))
    )
