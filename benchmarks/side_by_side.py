"""This package beside others, in one run: time as a ratio to Hugging Face's own, and peak memory.

    python benchmarks/side_by_side.py [FOLDER] [--lengths 128,512,1508] [--repeats 3] [--lxt LXT]

FOLDER is a causal language model saved for transformers; without it, random weights of the shape of
SmolLM2-135M. Prints a Markdown table with a column for each length and these rows, each the time as
a ratio to the first row, and the peak memory above the loaded model:

- HF sdpa, HF eager: a forward of Hugging Face's model and a backward to the embeddings, with
  torch's fused attention and with attention written out; no gradients of weights;
- TransformerLens: the same of the bridge, with one hook, at the embeddings;
- lxt: AttnLRP of the tokens by lxt, with ``--lxt`` and the folder of a checkout of it
  (github.com/rachtibat/LRP-eXplains-Transformers; the release 2.1 knows no transformers 5);
- attribute, graph: this package under ``attnlrp`` and ``gim``, the graph with ``mass=0.85``.

On the CPU time is processor time, with one thread unless ``--threads`` says more; on a GPU it is
wall time. Within each repeat the rows take turns, and the best of the repeats counts; before them
each row runs once to measure memory, the high-water mark of its process's resident set (CPU) or
torch's largest allocation (GPU). Rows whose estimated memory is not free are left out, with the
reason above the table, where it also stands how each call of this package ran. A model of 135M
parameters takes about twenty minutes with the defaults, most of them at 1,508 tokens;
``--lengths 8000 --repeats 1`` takes longer.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _columns import COLUMNS

ROOT = Path(__file__).resolve().parent.parent
ROWS = (
    "HF sdpa", "HF eager", "TransformerLens", "lxt",
    "attribute attnlrp", "attribute gim", "graph attnlrp", "graph gim",
)  # fmt: skip
BASE = ROWS[0]
SMOL = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
    "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
}  # fmt: skip
TINY = {
    **SMOL, "vocab_size": 64, "hidden_size": 36, "intermediate_size": 48, "num_hidden_layers": 2,
}  # fmt: skip


@dataclass
class Cell:
    """What was measured of one row at one length."""

    peak: int | None = None
    best: float | None = None
    skipped: str = ""
    ran: str = ""
    relevance: list[float] | None = None

    def text(self, base: float | None) -> str:
        if self.best is None:
            return "–"
        ratio = f"{self.best:.2f} s" if base is None else f"{self.best / base:.2f}"
        return ratio if self.peak is None else f"{ratio}, {size(self.peak)}"


def size(count: int) -> str:
    """A number of bytes as text."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


class Side:
    """The process of some columns; started again if it ends early."""

    def __init__(self, kind: str, options: dict[str, Any]) -> None:
        self.kind, self.options = kind, options
        self.skipped, self.clock = "", ""
        self._start()

    def ask(self, question: str, row: str, length: int) -> dict[str, Any]:
        if self.skipped:
            return {"skipped": self.skipped}
        if self._process.poll() is not None:
            self._start()
        assert self._process.stdin is not None
        print(json.dumps([question, row, length]), file=self._process.stdin, flush=True)
        return self._answer() or {"skipped": f"its process ended with {self._process.wait()}"}

    def close(self) -> None:
        self._process.communicate()

    def _start(self) -> None:
        command = [sys.executable, str(ROOT / "benchmarks" / "_columns.py")]
        self._process = subprocess.Popen(
            [*command, json.dumps([self.kind, self.options])],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        started = self._answer()
        if started is None:
            sys.exit(f"The process of {self.kind} ended early; its error stands above.")
        self.skipped, self.clock = started.get("skipped", ""), started.get("clock", "")

    def _answer(self) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else None


def measure(sides: dict[str, Side], rows: list[str], length: int, repeats: int) -> dict[str, Cell]:
    """The cells of one length."""
    cells = {row: Cell() for row in rows}
    for row, cell in cells.items():
        said = sides[row].ask("peak", row, length)
        cell.skipped, cell.peak = said.get("skipped", ""), said.get("peak")
        cell.ran, cell.relevance = said.get("ran", ""), said.get("relevance")
    for _ in range(repeats):
        for row, cell in cells.items():
            if cell.skipped:
                continue
            said = sides[row].ask("seconds", row, length)
            cell.skipped = said.get("skipped", "")
            if not cell.skipped:
                cell.best = min(said["seconds"], cell.best or said["seconds"])
    return cells


# Rows that compute the same relevance in other ways; what they differ by shows that they do.
SAME = (
    (BASE, "HF eager"), (BASE, "TransformerLens"),
    ("attribute attnlrp", "lxt"), ("attribute attnlrp", "graph attnlrp"),
)  # fmt: skip


def notes(length: int, cells: dict[str, Cell]) -> Iterator[str]:
    """What happened at one length, in words."""
    base = cells[BASE].best
    yield f"{length:,} tokens: " + (f"{BASE} took {base:.3f} s" if base else f"no {BASE}")
    for row, cell in cells.items():
        if cell.skipped:
            yield f"- {row} was left out: {cell.skipped}"
        elif cell.ran:
            yield f"- {row}: {cell.ran}"
    for one, other in SAME:
        a, b = (cells[row].relevance if row in cells else None for row in (one, other))
        if a and b:
            apart = max(abs(x - y) for x, y in zip(a, b, strict=True))
            yield f"- {one} and {other} differ by {apart / max(map(abs, a)):.0e} of the largest"


def table(rows: list[str], found: dict[int, dict[str, Cell]]) -> Iterator[str]:
    """The lines of the Markdown table."""
    yield "| | " + " | ".join(f"{n:,} tokens" for n in found) + " |"
    yield "| --- |" + " --- |" * len(found)
    for row in rows:
        texts = [cells[row].text(cells[BASE].best) for cells in found.values()]
        yield f"| {row} | " + " | ".join(texts) + " |"


@contextlib.contextmanager
def model_folder(folder: str | None, tiny: bool) -> Iterator[str]:
    """The user's folder, or one with random weights for a while."""
    if folder is not None:
        if not Path(folder, "config.json").is_file():
            sys.exit(f"{folder} has no config.json; give a model saved by save_pretrained.")
        yield folder
        return
    import transformers
    from _models import save_random

    with tempfile.TemporaryDirectory() as made:
        save_random(transformers.LlamaConfig(**(TINY if tiny else SMOL)), made)
        yield made


def main(arguments: list[str] | None = None) -> dict[int, dict[str, Cell]]:
    """Prints notes on each length, and the table at the end; returns the cells by length."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", help="a model saved for transformers")
    parser.add_argument("--lengths", default="128,512,1508")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--lxt", help="the folder of a checkout of lxt")
    parser.add_argument("--attention", choices=("auto", "fused", "eager"), default="auto",
                        help="for the calls of this package that take it")  # fmt: skip
    parser.add_argument("--rows", help="only these, divided by commas; HF sdpa always runs")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="a tiny random model, to try this out")
    args = parser.parse_args(arguments)
    lengths = [int(n) for n in args.lengths.split(",")]
    rows = [row for row in ROWS if row != "lxt" or args.lxt]
    if args.rows:
        wanted = [row.strip() for row in args.rows.split(",")]
        if unknown := set(wanted) - set(rows):
            parser.error(f"--rows: no {sorted(unknown)}; there are {rows}")
        rows = [row for row in rows if row in wanted or row == BASE]
    with model_folder(args.folder, args.tiny) as folder, contextlib.ExitStack() as stack:
        options = {key: getattr(args, key)
                   for key in ("device", "dtype", "threads", "attention", "lxt")}  # fmt: skip
        sides: dict[str, Side] = {}
        for kind, columns in COLUMNS.items():
            if not set(columns) & set(rows):
                continue
            side = Side(kind, {**options, "folder": folder})
            stack.callback(side.close)
            sides |= dict.fromkeys(columns, side)
        what = args.folder or ("a tiny random model" if args.tiny else "SmolLM2-135M's shape")
        print(f"{what}, {args.device}, {args.dtype}, {args.threads} thread(s): "
              f"{sides[BASE].clock} over that of {BASE} (best of {args.repeats}), "
              "and peak memory above the model", flush=True)  # fmt: skip
        found: dict[int, dict[str, Cell]] = {}
        try:
            for length in lengths:
                found[length] = measure(sides, rows, length, args.repeats)
                print("\n".join(notes(length, found[length])), flush=True)
        finally:
            print("\n" + "\n".join(table(rows, found)), flush=True)
    return found


if __name__ == "__main__":
    main()
