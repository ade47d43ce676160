"""Benchmarks at tiny shapes: what they measure is what they say, and what fails is a line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from support.lxt_stand_in import write_lxt
from truth.rounding import PROMISED

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import _columns  # noqa: E402
import compare_commits  # noqa: E402
import gpu  # noqa: E402
import side_by_side  # noqa: E402
from _measure import Meter  # noqa: E402


@pytest.fixture(autouse=True)
def this_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes that benchmarks start import the package that is tested."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


# ---- side_by_side.py


def apart(a: list[float], b: list[float]) -> float:
    """The largest difference, as a share of the largest of ``a``."""
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) / max(map(abs, a))


def test_every_row_is_measured_and_the_same_relevance_is_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lxt = str(write_lxt(tmp_path))
    found = side_by_side.main(["--tiny", "--lengths", "24,40", "--repeats", "1", "--lxt", lxt])
    assert list(found) == [24, 40]
    for length, cells in found.items():
        assert list(cells) == list(side_by_side.ROWS)
        for row, cell in cells.items():
            assert not cell.skipped, (row, cell.skipped)
            assert cell.best is not None
            assert cell.best > 0
            assert cell.relevance is not None
            assert len(cell.relevance) == length
        relevance: dict[str, Any] = {row: cell.relevance for row, cell in cells.items()}
        for one, other in side_by_side.SAME:
            assert apart(relevance[one], relevance[other]) < PROMISED[torch.float32]
        # and these are not the same by chance
        for other in ("HF sdpa", "attribute gim"):
            assert apart(relevance["lxt"], relevance[other]) > 10 * PROMISED[torch.float32]
    printed = capsys.readouterr().out
    assert "| | 24 tokens | 40 tokens |" in printed
    assert "| HF sdpa | 1.00" in printed
    assert "graph gim: plain" in printed


def test_an_lxt_that_patches_nothing_is_left_out_with_the_reason(tmp_path: Path) -> None:
    lxt = str(write_lxt(tmp_path, fails=True))
    arguments = ["--tiny", "--lengths", "8", "--repeats", "1", "--lxt", lxt, "--rows", "lxt"]
    cells = side_by_side.main(arguments)[8]
    assert "Failed to patch LlamaMLP" in cells["lxt"].skipped
    assert cells["lxt"].best is None
    assert cells["HF sdpa"].best is not None


class Squeezed(Meter):
    """A device with hardly any free memory."""

    def free(self) -> int:
        return 1000


def test_what_does_not_fit_is_not_run() -> None:
    options = {"device": "cpu", "dtype": "float32", "threads": torch.get_num_threads(),
               "attention": "auto", "lxt": None}  # fmt: skip
    with side_by_side.model_folder(None, True) as folder:
        columns = _columns.Columns("hf", {**options, "folder": folder})
    assert columns.answer("peak", "HF eager", 16)["ran"] == ""
    columns.meter = Squeezed("cpu")

    def never(ids: object) -> _columns.Answer:
        raise AssertionError(f"it was run with {ids}")

    columns.calls = dict.fromkeys(columns.calls, never)
    assert "needs about" in columns.answer("peak", "HF eager", 16)["skipped"]


def test_memory_that_is_estimated_grows_as_attention_is_kept() -> None:
    import transformers

    config = transformers.LlamaConfig(**side_by_side.SMOL)
    by_row = {
        row: [_columns.needed_bytes(config, row, n) for n in (1000, 8000)]
        for row in ("HF sdpa", "HF eager", "TransformerLens", "lxt", "graph gim")
    }
    assert by_row["HF sdpa"][1] == pytest.approx(8 * by_row["HF sdpa"][0])
    assert by_row["lxt"] == by_row["HF sdpa"]
    assert by_row["graph gim"] == [0, 0], "tiles are chosen where one pass does not fit"
    kept_by_30_blocks = 30 * 9 * 8000**2 * 4
    for row in ("HF eager", "TransformerLens"):
        assert by_row[row][1] > by_row["HF sdpa"][1] + kept_by_30_blocks


def test_peak_memory_is_what_a_call_adds() -> None:
    meter = Meter("cpu")
    peak, size = meter.peak(lambda: torch.ones(1 << 24).numel())
    if peak is None:
        pytest.skip("this system does not let a process reset its high-water mark")
    assert size == 1 << 24
    assert 60e6 < peak < 90e6, "64 MiB"


# ---- gpu.py


def gpu_run(folder: Path, *more: str) -> gpu.Book:
    return gpu.main(["--out", str(folder), "--device", "cpu", "--tiny", *more])


def test_gpu_measures_every_cell(tmp_path: Path) -> None:
    book = gpu_run(tmp_path, "--models", "Qwen3-0.6B", "Qwen3-8B")
    assert len(book.cells) == 2 * len(gpu.TINY_LENGTHS) * len(gpu.CELLS)
    assert not [cell.skipped for cell in book.cells if cell.skipped]
    assert all(cell.seconds is not None and cell.seconds > 0 for cell in book.cells)
    assert all(cell.edges for cell in book.cells if cell.what == "graph")
    lines = (tmp_path / "gpu.jsonl").read_text().splitlines()
    assert [json.loads(line)["what"] for line in lines] == [cell.what for cell in book.cells]
    page = (tmp_path / "gpu.md").read_text()
    assert page.count("| Qwen3-8B |") == len(gpu.TINY_LENGTHS)
    assert "–" not in page


def test_the_published_shapes_have_the_published_sizes() -> None:
    """Billions of weights, in the names; the configurations are never built in memory here."""
    import transformers

    for name, (shape, _) in gpu.SHAPES.items():
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(transformers.Qwen3Config(**shape))
        billions = sum(p.numel() for p in model.parameters()) / 1e9
        assert billions == pytest.approx(float(name.removeprefix("Qwen3-")[:-1]), rel=0.03)
        forward = gpu.operations(shape, 1) / 4
        embedding = shape["vocab_size"] * shape["hidden_size"] / 1e9
        untied = 0 if shape["tie_word_embeddings"] else embedding
        assert forward / 1e9 == pytest.approx(billions - untied, rel=0.01)


def test_without_time_nothing_is_run_and_the_table_says_so(tmp_path: Path) -> None:
    book = gpu_run(tmp_path, "--models", "Qwen3-0.6B", "--budget", "0")
    assert all(cell.skipped.startswith("no time") for cell in book.cells)
    assert len(book.cells) == len(gpu.TINY_LENGTHS) * len(gpu.CELLS)
    assert "no time" in (tmp_path / "gpu.md").read_text()


def test_a_cell_that_runs_out_of_memory_ends_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = gpu.relevance

    def scarce(bridge: Any, ids: torch.Tensor, what: str, rules: str) -> Any:
        if what == "graph" and ids.shape[1] == gpu.TINY_LENGTHS[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(bridge, ids, what, rules)

    monkeypatch.setattr(gpu, "relevance", scarce)
    book = gpu_run(tmp_path, "--models", "Qwen3-0.6B")
    failed = [(cell.what, cell.tokens, cell.skipped) for cell in book.cells if cell.skipped]
    assert failed == [("graph", gpu.TINY_LENGTHS[0], "out of memory")]


def test_a_model_that_cannot_be_made_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = gpu.make

    def make(shape: dict[str, Any], *rest: Any) -> Any:
        if not shape["tie_word_embeddings"]:  # only the 8B has an unembedding of its own
            raise torch.OutOfMemoryError("no room for the weights")
        return real(shape, *rest)

    monkeypatch.setattr(gpu, "make", make)
    book = gpu_run(tmp_path, "--models", "Qwen3-8B", "Qwen3-0.6B")
    assert "no room for the weights" in book.cells[0].skipped
    assert {cell.model for cell in book.cells if cell.seconds is not None} == {"Qwen3-0.6B"}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_cell_is_ended_when_its_time_is_over() -> None:
    """Also if the first alarm rings inside a callback of Python's own, which drops it."""
    began = time.monotonic()
    cell = gpu.Cell("m", 1, "graph")
    clock = gpu.Clock(time.time() + 0.2)
    gpu.run(cell, lambda: (time.sleep(30), None), Meter("cpu"), clock)
    assert cell.skipped == "out of time"
    assert time.monotonic() - began < 20


def test_cells_are_left_out_by_what_was_measured_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = gpu.SHAPES["Qwen3-8B"][0]
    book = gpu.Book(tmp_path, "")
    book.add(gpu.Cell("m", 512, "graph", seconds=2.0, edges=10_000))
    clock = gpu.Clock(time.time() + 30)

    def reason(tokens: int) -> str:
        return gpu.reason_to_skip(book, "m", shape, "graph", tokens, clock, gpu=True)

    assert reason(1000) == ""
    assert reason(32768).startswith("no time: about")
    long = gpu.Clock(time.time() + 1e6)
    assert gpu.reason_to_skip(book, "m", shape, "graph", 32768, long, gpu=True) == ""
    book.add(gpu.Cell("m", 2300, "graph", seconds=2.0, edges=1_000_000))
    monkeypatch.setattr(
        psutil, "virtual_memory", lambda: type("Free", (), {"available": 8_000_000_000})
    )
    told = gpu.reason_to_skip(book, "m", shape, "graph", 32768, long, gpu=True)
    assert told == "no memory: the edges take about 8 GB, 8 are free"


# ---- two checkouts


def test_long_prompts_of_two_checkouts_in_turns(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "long_context.py"), "--shape", "tiny"]
    command += ["--lengths", "32", "--memory", "tiled", "--threads", "1"]
    done = subprocess.run(
        [*command, "--against", str(ROOT)],
        capture_output=True, text=True, check=True, env=dict(os.environ), cwd=tmp_path,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert [line.split(" ")[0] for line in lines] == ["before", "after", "32"]
    runs = [json.loads(line.partition(" ")[2]) for line in lines[:2]]
    assert runs[0]["kept_edges"] == runs[1]["kept_edges"] > 0
    assert lines[2].startswith("32 tiled, after / before: seconds ")


def test_a_checkout_that_was_not_imported_is_not_measured(tmp_path: Path) -> None:
    compare_commits.require_from(ROOT)
    with pytest.raises(SystemExit, match="was imported, not the package in"):
        compare_commits.require_from(tmp_path)
