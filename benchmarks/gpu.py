"""Figures on one GPU: Qwen3's shapes from 64 to 32,768 tokens, within a time budget, offline.

    python benchmarks/gpu.py --out FOLDER                # one H200-class GPU, nine minutes
    python benchmarks/gpu.py --out FOLDER --device cpu --tiny      # seconds; tries the script out

For the shapes of Qwen3-0.6B, 8B and 4B (random bfloat16 weights, made on the device) and each
length: Hugging Face's forward and backward with fused attention, ``attribute``, and
``attribution_graph`` with ``mass=0.85``; wall time, and peak memory above the model. Lengths are
those that others publish: Neuronpedia's graphs end at 64 tokens, circuit-tracer ran out of memory
near 2,300 on an H100, FlashTrace reports 16.8 s and 222 GB on several GPUs at 5,000 with Qwen3-8B,
and no result at 10,000.

Cells are in the order of what they are worth, and each model has a share of the time left. A cell
is left out if it would take longer than that by the speed of the cells before it, or if its edges
would not fit into the host's memory by the share that was kept before; one that runs out of memory
or time ends alone. After every cell FOLDER/gpu.jsonl has one more line, and FOLDER/gpu.md is the
table so far.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from _measure import Meter
from _models import bridge_in_memory, sharpen

import tl_contrastive_lrp as clrp

MASS = 0.85
FIRST = "HF sdpa"
CELLS = (FIRST, "attribute", "graph")
_QWEN3 = {
    "vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}  # fmt: skip
# In the order in which they run; with each the share of the time left that it may take.
SHAPES: dict[str, tuple[dict[str, Any], float]] = {
    "Qwen3-0.6B": (
        {**_QWEN3, "num_hidden_layers": 28, "hidden_size": 1024, "num_attention_heads": 16,
         "intermediate_size": 3072, "tie_word_embeddings": True},
        0.25,
    ),
    "Qwen3-8B": (
        {**_QWEN3, "num_hidden_layers": 36, "hidden_size": 4096, "num_attention_heads": 32,
         "intermediate_size": 12288, "tie_word_embeddings": False},
        0.65,
    ),
    "Qwen3-4B": (
        {**_QWEN3, "num_hidden_layers": 36, "hidden_size": 2560, "num_attention_heads": 32,
         "intermediate_size": 9728, "tie_word_embeddings": True},
        1.0,
    ),
}  # fmt: skip
TINY = {
    "vocab_size": 64, "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 24,
}  # fmt: skip
LENGTHS = (512, 5000, 12374, 2300, 32768, 1508, 64)
TINY_LENGTHS = (24, 48)
# Operations a second assumed of a GPU where nothing has been measured.
GUESSED = {FIRST: 2e14, "attribute": 5e13, "graph": 2e13}
BYTES_BY_EDGE = 40
AGAIN_BELOW = 3.0  # seconds; cells as short as this run twice, and the better time counts


class OutOfTime(Exception):
    """A cell ran past the budget."""


@dataclass
class Cell:
    """A line of gpu.jsonl.

    ``peak_gb`` is above the model, ``model_gb`` its weights, in 10^9 bytes; ``skipped`` says why
    there are no figures.
    """

    model: str
    tokens: int
    what: str
    seconds: float | None = None
    peak_gb: float | None = None
    model_gb: float | None = None
    ran: str = ""
    edges: int | None = None
    skipped: str = ""


@dataclass(frozen=True)
class Clock:
    """What is left until ``end``, in seconds of ``time.time()``."""

    end: float

    @property
    def left(self) -> float:
        return self.end - time.time()

    def share(self, part: float) -> Clock:
        """A clock that ends when this part of what is left has passed."""
        return Clock(time.time() + part * max(self.left, 0.0))

    @contextlib.contextmanager
    def alarm(self) -> Iterator[None]:
        """Raise ``OutOfTime`` at the end, as soon as Python has its turn."""

        def ring(*_: Any) -> None:
            raise OutOfTime

        before = signal.signal(signal.SIGALRM, ring)
        # Once a second: Python drops an exception that is raised in a callback of its own.
        signal.setitimer(signal.ITIMER_REAL, max(self.left, 0.01), 1.0)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


class Book:
    """The cells so far, on disk after each."""

    def __init__(self, folder: Path, head: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.head, self.cells = folder, head, list[Cell]()
        (folder / "gpu.jsonl").write_text("")

    def add(self, cell: Cell) -> None:
        self.cells.append(cell)
        with open(self.folder / "gpu.jsonl", "a") as lines:
            print(json.dumps(asdict(cell)), file=lines)
        (self.folder / "gpu.md").write_text("\n".join(self.page()) + "\n")
        figures = f"{cell.seconds:.3f} s" if cell.seconds is not None else cell.skipped
        peak = f", {cell.peak_gb:.1f} GB" if cell.peak_gb is not None else ""
        print(f"{cell.model} {cell.tokens:,} {cell.what}: {figures}{peak} {cell.ran}", flush=True)

    def measured(self, model: str, what: str) -> list[Cell]:
        return [c for c in self.cells
                if c.model == model and c.what == what and c.seconds is not None]  # fmt: skip

    def page(self) -> Iterator[str]:
        """The table, and why cells are missing."""
        yield self.head
        yield ""
        yield "| model | tokens | " + " | ".join(CELLS) + " | edges kept | graph ran |"
        yield "| --- |" + " --- |" * (len(CELLS) + 3)
        by_row: dict[tuple[str, int], dict[str, Cell]] = {}
        for cell in self.cells:
            by_row.setdefault((cell.model, cell.tokens), {})[cell.what] = cell
        for (model, tokens), cells in sorted(by_row.items(), key=lambda row: row[0]):
            first = cells[FIRST].seconds if FIRST in cells else None
            texts = [_text(cells.get(what), first) for what in CELLS]
            graph = cells.get("graph", Cell(model, tokens, "graph"))
            edges = "" if graph.edges is None else f"{graph.edges:,}"
            yield f"| {model} | {tokens:,} | " + " | ".join(texts) + f" | {edges} | {graph.ran} |"
        yield ""
        for cell in self.cells:
            if cell.skipped:
                yield f"- {cell.model}, {cell.tokens:,} tokens, {cell.what}: {cell.skipped}"


def _text(cell: Cell | None, first: float | None) -> str:
    if cell is None or cell.seconds is None:
        return "–"
    ratio = "" if first is None or cell.what == FIRST else f" ({cell.seconds / first:.1f}×)"
    peak = "" if cell.peak_gb is None else f", {cell.peak_gb:.1f} GB"
    return f"{cell.seconds:.2f} s{ratio}{peak}"


def operations(shape: dict[str, Any], tokens: int) -> float:
    """About how many multiplications and additions a forward and a backward take."""
    width, layers = shape["hidden_size"], shape["num_hidden_layers"]
    heads = shape["num_attention_heads"] * shape["head_dim"]
    keys = shape["num_key_value_heads"] * shape["head_dim"]
    weights = layers * width * (2 * heads + 2 * keys + 3 * shape["intermediate_size"])
    weights += width * shape["vocab_size"]
    return 4.0 * weights * tokens + 8.0 * layers * heads * tokens**2


def predicted_seconds(
    book: Book, model: str, shape: dict[str, Any], what: str, tokens: int, gpu: bool
) -> float:
    """How long a cell may take, by the speed of the cell nearest in length; 0 for no idea."""
    done = book.measured(model, what)
    if not done:
        return operations(shape, tokens) / GUESSED[what] if gpu else 0.0
    near = min(done, key=lambda cell: abs(math.log(cell.tokens / tokens)))
    assert near.seconds is not None
    return near.seconds * operations(shape, tokens) / operations(shape, near.tokens)


def predicted_edges(book: Book, model: str, tokens: int) -> float:
    """How many edges a graph may keep, if the share kept is that of the longest so far."""
    done = book.measured(model, "graph")
    if not done:
        return 0.0
    longest = max(done, key=lambda cell: cell.tokens)
    return (longest.edges or 0) * (tokens / longest.tokens) ** 2


def reason_to_skip(
    book: Book, model: str, shape: dict[str, Any], what: str, tokens: int, clock: Clock, gpu: bool
) -> str:
    """Why a cell is not tried; "" if it is."""
    seconds = predicted_seconds(book, model, shape, what, tokens, gpu)
    if seconds > clock.left or clock.left <= 0:
        return f"no time: about {seconds:.0f} s, {max(clock.left, 0):.0f} s are left"
    need = BYTES_BY_EDGE * predicted_edges(book, model, tokens) if what == "graph" else 0.0
    free = psutil.virtual_memory().available
    if need > 0.7 * free:
        return f"no memory: the edges take about {need / 1e9:.0f} GB, {free / 1e9:.0f} are free"
    return ""


def run(cell: Cell, call: Callable[[], Any], meter: Meter, clock: Clock) -> Cell:
    """Fill in the figures of a cell, or why it has none."""
    try:
        with clock.alarm():
            peak, (seconds, result) = meter.peak(lambda: meter.seconds(call))
            cell.ran, cell.edges = result
            cell.peak_gb = None if peak is None else peak / 1e9
            cell.seconds = seconds
            if seconds < AGAIN_BELOW and clock.left > 2 * seconds:
                cell.seconds = min(seconds, meter.seconds(call)[0])
    except torch.OutOfMemoryError:
        cell.skipped = "out of memory"
    except OutOfTime:
        if cell.seconds is None:
            cell.skipped = "out of time"
    except Exception as error:  # one cell's failure is a line of the table
        cell.skipped = f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
    meter.release()  # here, where the error no longer holds its tensors
    return cell


def make(shape: dict[str, Any], device: str, sharpness: float) -> Any:
    """A random Qwen3 in bfloat16, born on the device, whose weights need no gradients."""
    torch.manual_seed(0)
    config = transformers.Qwen3Config(**shape)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    sharpen(model, sharpness)
    return model.to(device).eval().requires_grad_(False)


def plain(hf: Any, ids: torch.Tensor) -> tuple[str, None]:
    """Hugging Face's forward, and the backward to the embeddings."""
    embedded = hf.get_input_embeddings()(ids).detach().requires_grad_(True)
    logits = hf(inputs_embeds=embedded, use_cache=False).logits[0, -1]
    torch.autograd.grad(logits[5] - logits[7], embedded)
    return "sdpa", None


def relevance(bridge: Any, ids: torch.Tensor, what: str, rules: str) -> tuple[str, int | None]:
    """How the call ran, and how many edges it kept."""
    objective = clrp.logit_diff(bridge, 5, 7)
    if what == "attribute":
        result = clrp.attribute(bridge, ids, objective, rules=rules, progress=False)
        _require_finite(result.tokens)
        return f"{result.memory}, {result.attention}", None
    graph = clrp.attribution_graph(bridge, ids, objective, rules=rules, mass=MASS, progress=False)
    _require_finite(graph.relevance)
    ran = ", ".join(filter(None, [graph.memory, getattr(graph, "attention", "")]))
    return ran, len(graph.weight)


def _require_finite(found: torch.Tensor) -> None:
    if not bool(torch.isfinite(found).all()):
        raise FloatingPointError("relevance that is not finite")


def of_model(
    book: Book, name: str, shape: dict[str, Any], args: argparse.Namespace, clock: Clock
) -> None:
    """All cells of one model: first those of Hugging Face's, which the bridge then takes over."""
    meter = Meter(args.device)
    hf = make(shape, args.device, args.sharpness)
    weights = sum(p.numel() * p.element_size() for p in hf.parameters()) / 1e9
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(8, shape["vocab_size"], (1, max(args.lengths)), generator=generator)
    ids = ids.to(args.device)

    def cells(what: str, call: Callable[[torch.Tensor, str], Any], lengths: list[int]) -> None:
        for tokens in lengths:
            cell = Cell(name, tokens, what, model_gb=weights)
            cell.skipped = reason_to_skip(book, name, shape, what, tokens, clock, meter.on_gpu)
            if not cell.skipped:
                cell = run(cell, lambda: call(ids[:, :tokens], what), meter, clock)
            book.add(cell)

    plain(hf, ids[:, :16])  # what is done once
    cells(FIRST, lambda some, _: plain(hf, some), args.lengths)
    bridge = bridge_in_memory(hf)
    for what in CELLS[1:]:  # audits, and the closed form held against autograd
        relevance(bridge, ids[:, :16], what, args.rules)
    for tokens in args.lengths:
        for what in CELLS[1:]:
            cells(what, lambda some, what: relevance(bridge, some, what, args.rules), [tokens])


def head(args: argparse.Namespace) -> str:
    """What was measured, on what."""
    gpu = args.device.startswith("cuda")
    device = torch.cuda.get_device_name(args.device) if gpu else args.device
    kind = "wall time" if gpu else "processor time"
    return (
        f"{device}; torch {torch.__version__}, transformers {transformers.__version__}; random "
        f"bfloat16 weights{' of tiny models' if args.tiny else ''}, {args.rules}, {kind} and peak "
        f"memory above the model; {FIRST} is Hugging Face's forward and backward with fused "
        "attention, × is the ratio to it."
    )


def main(arguments: list[str] | None = None, began: float | None = None) -> Book:
    """Run all cells that the budget allows, counted from when the process began, if given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="a folder for the results")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds, with all loading")
    parser.add_argument("--models", nargs="+", choices=tuple(SHAPES), default=list(SHAPES))
    parser.add_argument("--lengths", type=int, nargs="+", help="in the order of their worth")
    parser.add_argument("--rules", choices=clrp.RULE_SETS, default=clrp.DEFAULT_RULES)
    parser.add_argument("--sharpness", type=float, default=2.0,
                        help="factor on the weights of q_norm and k_norm")  # fmt: skip
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try this out")
    args = parser.parse_args(arguments)
    args.lengths = args.lengths or list(TINY_LENGTHS if args.tiny else LENGTHS)
    clock = Clock((began or time.time()) + args.budget)
    book = Book(args.out, head(args))
    for name in args.models:
        shape, part = SHAPES[name]
        shape = {**shape, **TINY} if args.tiny else shape
        failed = ""
        try:
            of_model(book, name, shape, args, clock.share(part))
        except Exception as error:  # the next model may still fit
            failed = f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
        if failed:
            book.add(Cell(name, 0, "all that is missing", skipped=failed))
        Meter(args.device).release()
    return book


if __name__ == "__main__":
    main(began=psutil.Process().create_time())
