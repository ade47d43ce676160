"""Opening a benchmark: formats of files, the hub, and rows that are none."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from tl_contrastive_lrp.errors import FileFormatError
from tl_contrastive_lrp.study.benchmarks import BENCHMARKS, open_benchmark, published_table

ROWS = [
    {"question": "How many, é\u2028or not?", "answer": "Two.\n#### 2"},
    {"question": 'Say "three", please', "answer": "#### 3"},
    {"question": "And four?\nReally?", "answer": "#### 4"},
]


def written(path: Path, rows: list[Any]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n\n" for r in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    benchmark = open_benchmark("gsm8k", path=written(tmp_path / f"r{suffix}", ROWS))
    assert [item.row for item in benchmark.items()] == ROWS
    assert [item.reference for item in benchmark.items()] == [row["answer"] for row in ROWS]


def test_places_are_those_of_the_file(tmp_path: Path) -> None:
    for suffix, expected in {
        ".jsonl": ["line 1", "line 3", "line 5"],  # a blank line after each
        ".csv": ["line 2", "line 4", "line 5"],  # the first answer has two lines
        ".json": ["element 1", "element 2", "element 3"],
        ".parquet": ["row 1", "row 2", "row 3"],
    }.items():
        benchmark = open_benchmark("gsm8k", path=written(tmp_path / f"r{suffix}", ROWS))
        found = [item.source for item in benchmark.items()]
        assert found == [f"r{suffix}, {place}" for place in expected]


def test_limit_takes_the_first(tmp_path: Path) -> None:
    path = written(tmp_path / "r.jsonl", ROWS)
    assert len(open_benchmark("gsm8k", path=path, limit=2).items()) == 2
    for limit in (0, -1, 1.5):
        with pytest.raises(ValueError, match="limit"):
            open_benchmark("gsm8k", path=path, limit=limit)  # type: ignore[arg-type]


def test_lines_that_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"question": "a?", "answer": "#### 1"}\n{"question"\n[1]\n\xff\n')
    with pytest.raises(FileFormatError, match=r"r\.jsonl, line 2: no JSON"):
        open_benchmark("gsm8k", path=path)
    with pytest.warns(UserWarning, match="3 malformed rows") as caught:
        benchmark = open_benchmark("gsm8k", path=path, on_error="skip")
    text = str(caught[0].message)
    assert all(f"r.jsonl, line {number}: " in text for number in (2, 3, 4))
    assert len(benchmark.items()) == 1


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    """JSON may hold U+2028, U+2029 and U+0085 as they are."""
    question = "One\u2028two\u2029three\x85four?"
    row = json.dumps({"question": question, "answer": "#### 1"}, ensure_ascii=False)
    path = tmp_path / "r.jsonl"
    path.write_bytes(f"{row}\n{row}\n".encode())
    items = open_benchmark("gsm8k", path=path).items()
    assert [item.id for item in items] == ["1", "2"]
    assert all(item.row["question"] == question for item in items)
    assert items[1].source == "r.jsonl, line 2"


def test_a_row_that_is_no_unicode_text_is_malformed(tmp_path: Path) -> None:
    """Half a surrogate pair, which JSON can hold and no tokenizer takes."""
    path = tmp_path / "r.jsonl"
    good = '{"question": "a \\ud83d\\ude00?", "answer": "#### 1"}\n'
    path.write_text(good + good.replace("\\ude00", ""))
    with pytest.raises(FileFormatError, match=r"r\.jsonl, line 2: no Unicode text"):
        open_benchmark("gsm8k", path=path)
    with pytest.warns(UserWarning, match="line 2: no Unicode text"):
        benchmark = open_benchmark("gsm8k", path=path, on_error="skip")
    assert [item.id for item in benchmark.items()] == ["1"]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_benchmark("gsm8k", path=tmp_path / "none.jsonl")
    (tmp_path / "r.txt").write_text("x")
    with pytest.raises(ValueError, match="suffix"):
        open_benchmark("gsm8k", path=tmp_path / "r.txt")
    (tmp_path / "r.json").write_text("{}")
    with pytest.raises(FileFormatError, match="list of objects"):
        open_benchmark("gsm8k", path=tmp_path / "r.json")
    (tmp_path / "r.parquet").write_text("no parquet")
    with pytest.raises(FileFormatError, match="Parquet"):
        open_benchmark("gsm8k", path=tmp_path / "r.parquet")
    (tmp_path / "e.jsonl").write_text("\n")
    with pytest.raises(FileFormatError, match="no row"):
        open_benchmark("gsm8k", path=tmp_path / "e.jsonl")
    with pytest.raises(ValueError, match="split"):
        open_benchmark("gsm8k", path=tmp_path / "e.jsonl", split="test")


def test_the_same_id_twice_is_refused(tmp_path: Path) -> None:
    row = {"problem": "p", "solution": "s", "answer": "1", "unique_id": "a"}
    path = written(tmp_path / "r.jsonl", [row, row])
    with pytest.raises(FileFormatError, match=r"line 3: the id 'a' is that of r\.jsonl, line 1"):
        open_benchmark("math", path=path)


def test_offline_it_says_which_file_to_give() -> None:
    with pytest.raises(FileNotFoundError, match="open_benchmark") as error:
        open_benchmark("gsm8k")
    text = str(error.value)
    assert "openai/gsm8k" in text
    assert "question, answer" in text


def test_the_hub_is_asked_for_the_published_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    items = open_benchmark("gsm8k", limit=2).items()
    open_benchmark("gsm8k", split="train", revision="abc")
    assert asked[0] == (("openai/gsm8k", "main"), {"split": "test", "revision": None})
    assert asked[1][1] == {"split": "train", "revision": "abc"}
    assert [item.id for item in items] == ["1", "2"]
    assert items[0].source == "openai/gsm8k (test), row 1"


def test_unknown_names_and_options(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown benchmark: 'gsm'"):
        open_benchmark("gsm")
    with pytest.raises(ValueError, match="on_error"):
        open_benchmark("gsm8k", path=written(tmp_path / "r.jsonl", ROWS), on_error="ignore")
    with pytest.raises(TypeError):
        open_benchmark("gsm8k", path=tmp_path / "r.jsonl", loose=True)


def test_every_published_benchmark_has_its_table() -> None:
    tables = {name: published_table(name) for name in BENCHMARKS}
    assert tables.pop("demo") is None
    assert all(table is not None and table.licence for table in tables.values())
    assert published_table("of one's own") is None
