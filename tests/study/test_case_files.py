"""Files of cases: the same cases come back, or the file is refused with the place."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support.study_cases import made_case

from tl_contrastive_lrp.errors import FileFormatError
from tl_contrastive_lrp.study import case_files, load_cases, save_cases, write_card
from tl_contrastive_lrp.study.cases import Case, Provenance, Verdict, record_of

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=4,
)
NAMES = TEXTS.filter(lambda text: bool(text.strip()))
IDS = st.lists(st.integers(0, 2**63 - 1), min_size=2, max_size=4).map(tuple)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    written = draw(IDS)
    position = draw(st.integers(0, len(written) - 1))
    prompt = draw(IDS)
    length = len(prompt) + position
    spans = st.tuples(st.integers(0, length - 1), st.integers(1, length)).filter(
        lambda s: s[0] < s[1]
    )
    return Case(
        id=draw(NAMES),
        benchmark=draw(NAMES),
        prompt=draw(TEXTS),
        prompt_ids=prompt,
        completion=draw(TEXTS),
        completion_ids=written,
        target_position=position,
        target_id=written[position],
        target=draw(TEXTS),
        contrast_id=draw(st.integers(0, 2**63 - 1).filter(lambda i: i != written[position])),
        contrast=draw(TEXTS),
        delta=draw(st.floats(allow_nan=False, allow_infinity=False)),
        verdict=Verdict(False, draw(TEXTS)),
        provenance=Provenance(
            draw(NAMES),
            draw(st.none() | NAMES),
            draw(TEXTS),
            draw(st.dictionaries(TEXTS, JSON, max_size=2)),
            draw(TEXTS),
            draw(TEXTS),
        ),
        messages=draw(
            st.none()
            | st.lists(
                st.fixed_dictionaries({"role": TEXTS}, optional={"content": JSON}), max_size=2
            ).map(tuple)
        ),
        tools=draw(st.none() | st.lists(st.dictionaries(TEXTS, JSON, max_size=2)).map(tuple)),
        reference=draw(st.none() | TEXTS),
        segments=draw(st.dictionaries(NAMES, st.lists(spans, max_size=2).map(tuple), max_size=2)),
        decisive_positions=draw(
            st.none()
            | st.sets(st.integers(0, length - 1), max_size=3).map(lambda s: tuple(sorted(s)))
        ),
        locator=draw(NAMES),
        contrast_source=draw(NAMES),
    )


def same(a: Case, b: Case) -> bool:
    """Equality that also tells 0.0 from -0.0, 1 from True and one order of keys from another."""
    signs = math.copysign(1, a.delta) == math.copysign(1, b.delta)
    return a == b and signs and json.dumps(record_of(a)) == json.dumps(record_of(b))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@settings(max_examples=60)
@given(st.lists(cases(), max_size=3, unique_by=lambda case: case.id))
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, given: list[Case]
) -> None:
    path = tmp_path_factory.mktemp("cases") / f"cases{suffix}"
    assert save_cases(given, path) == path
    loaded = load_cases(path)
    assert len(loaded) == len(given)
    assert all(map(same, loaded, given))
    before = path.read_bytes()
    save_cases(loaded, path)
    assert path.read_bytes() == before


def test_datasets_reads_both(tmp_path: Path) -> None:
    given = [made_case(), made_case(id="made/2", messages=None, tools=None)]
    save_cases(given, tmp_path / "a.parquet")
    save_cases(given, tmp_path / "a.jsonl")
    cache = str(tmp_path / "cache")
    table = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "a.parquet"), split="train", cache_dir=cache
    )
    assert table.features == case_files.features()
    assert table["target_id"] == [12, 12]
    assert json.loads(table[0]["messages"]) == list(given[0].messages or ())
    assert json.loads(table[1]["messages"]) is None


def written(path: Path, records: list[Any]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
        return path
    import pyarrow
    import pyarrow.parquet

    rows = []
    for record in records:
        row = record | {n: json.dumps(record[n]) for n in case_files.JSON_FIELDS}
        row["provenance"] = record["provenance"] | {
            "decoding": json.dumps(record["provenance"]["decoding"])
        }
        rows.append(row)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize(("suffix", "place"), [(".jsonl", "line"), (".parquet", "row")])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_another_version_is_refused_whatever_is_asked(
    tmp_path: Path, suffix: str, place: str, on_error: Any
) -> None:
    record = record_of(made_case())
    path = written(tmp_path / f"c{suffix}", [record, record | {"id": "b", "version": 2}])
    with pytest.raises(FileFormatError, match=rf"c\{suffix}, {place} 2: .*version 2.*reads 1"):
        load_cases(path, on_error=on_error)


@pytest.mark.parametrize(("suffix", "place"), [(".jsonl", "line"), (".parquet", "row")])
def test_malformed_rows_are_fatal_or_skipped_and_named(
    tmp_path: Path, suffix: str, place: str
) -> None:
    good = record_of(made_case())
    records = [good, good | {"id": "b", "target_id": 13}, good, good | {"id": "d"}]
    path = written(tmp_path / f"c{suffix}", records)
    with pytest.raises(FileFormatError, match=rf"c\{suffix}, {place} 2: field 'target_id' is 13"):
        load_cases(path)
    with pytest.warns(UserWarning, match="2 malformed cases") as caught:
        loaded = load_cases(path, on_error="skip")
    text = str(caught[0].message)
    assert f"{place} 2: field 'target_id'" in text
    assert f"{place} 3: field 'id': 'made/1' is the id of the case at c{suffix}, {place} 1" in text
    assert [case.id for case in loaded] == ["made/1", "d"]


def test_lines_that_are_no_cases(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'\n{"id"\n[]\n\xff\n')
    with pytest.raises(FileFormatError, match=r"c\.jsonl, line 2: no JSON"):
        load_cases(path)
    with pytest.warns(UserWarning, match="3 malformed") as caught:
        assert load_cases(path, on_error="skip") == ()
    assert all(f"line {n}: " in str(caught[0].message) for n in (2, 3, 4))


def test_json_columns_of_parquet_are_checked(tmp_path: Path) -> None:
    import pyarrow.parquet

    path = save_cases([made_case()], tmp_path / "c.parquet")
    table = pyarrow.parquet.read_table(path)
    index = table.schema.get_field_index("messages")
    pyarrow.parquet.write_table(table.set_column(index, "messages", [["{"]]), path)
    with pytest.raises(FileFormatError, match=r"c\.parquet, row 1: field 'messages' is no JSON"):
        load_cases(path)
    (tmp_path / "d.parquet").write_bytes(b"PAR1")
    with pytest.raises(FileFormatError, match="no readable Parquet"):
        load_cases(tmp_path / "d.parquet")


def test_what_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    path = save_cases([made_case()], tmp_path / "c.jsonl")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="'made/1'"):
        save_cases([made_case(), made_case(delta=3.0)], path)
    with pytest.raises(TypeError, match="Case"):
        save_cases([{"id": "a"}], path)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="suffix"):
        save_cases([], tmp_path / "c.csv")
    with pytest.raises(FileNotFoundError, match="mkdir"):
        save_cases([], tmp_path / "no" / "c.jsonl")
    with pytest.raises(ValueError, match="on_error"):
        load_cases(path, on_error="warn")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        load_cases(tmp_path / "none.jsonl")
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.jsonl"]


def test_the_card_says_what_is_in_the_file(tmp_path: Path) -> None:
    given = [
        made_case(id=f"{name}/{n}", benchmark=name)
        for name, count in (("gsm8k", 2), ("made", 1))
        for n in range(count)
    ]
    path = save_cases(given, tmp_path / "cases.parquet", card=True, licence="mit")
    _, header, text = (tmp_path / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    data = yaml.safe_load(header)
    assert data["license"] == "mit"
    assert data["configs"][0]["data_files"] == [{"split": "train", "path": "cases.parquet"}]
    assert data["size_categories"] == ["n<1K"]
    columns = [feature["name"] for feature in data["dataset_info"]["features"]]
    assert columns == list(case_files.features())
    assert (
        "| gsm8k | 2 | [openai/gsm8k](https://huggingface.co/datasets/openai/gsm8k) | MIT |" in text
    )
    assert "| made | 1 |  |  |" in text
    assert "| demo/small@1000 | main | 0.1.0 | 3 |" in text
    # The header is what the hub's own library reads back.
    from datasets.info import DatasetInfosDict
    from huggingface_hub import DatasetCard

    card = DatasetCard.load(tmp_path / "README.md")
    info = DatasetInfosDict.from_dataset_card_data(card.data)["default"]
    assert info.features == case_files.features()
    assert write_card(given, path).read_text(encoding="utf-8").startswith("---\nlicense: other\n")
    loaded = datasets.load_dataset(str(tmp_path), cache_dir=str(tmp_path / "cache"))
    assert loaded["train"].num_rows == 3
