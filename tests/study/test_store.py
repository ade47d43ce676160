"""The store: written whole, read back exactly or refused, and never served for something else."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch

import tl_contrastive_lrp
from tl_contrastive_lrp.errors import FileFormatError
from tl_contrastive_lrp.study.store import Key, Store, canonical

CAUSES = {"prompt": [3, 5], "model": "abc", "rules": "attnlrp", "mass": 0.85, "limit": 16}


def test_what_is_put_is_what_is_got(tmp_path: Path) -> None:
    store = Store(tmp_path / "new" / "store")
    key = store.key("case", **CAUSES)
    tensors = {
        "a": torch.randn(3, 4).T,
        "b": torch.tensor([True, False]),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "none": torch.zeros(0, 3),
    }
    assert not store.has(key)
    with pytest.raises(KeyError, match=key):
        store.get(key)
    store.put(key, {"x": [1, None, "ü"], "nan": float("inf")}, tensors, {"seconds": 2})
    entry = Store(store.folder).get(key)
    assert store.has(key)
    assert entry.record == {"x": [1, None, "ü"], "nan": float("inf")}
    assert (entry.key, entry.notes) == (key, {"seconds": 2})
    assert entry.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert entry.tensors[name].dtype == tensor.dtype
        assert torch.equal(entry.tensors[name], tensor), name
    assert store.keys("case") == [key]
    assert store.keys("chunk") == []


def test_a_key_changes_with_every_cause(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    store = Store(tmp_path)
    changed = {
        "prompt": [[3], [35], [5, 3], ["3", "5"], []],
        "model": ["abd", "ab c", None],
        "rules": ["cplrp"],
        "mass": [0.850001, 0.9, "0.85"],
        "limit": [15, 16.5, "16"],
    }
    keys = [store.key("case", **CAUSES), store.key("chunk", **CAUSES)]
    keys += [store.key("case", **CAUSES, more=1)]
    keys += [store.key("case", **{**CAUSES, name: v}) for name, vs in changed.items() for v in vs]
    monkeypatch.setattr(tl_contrastive_lrp, "__version__", "0.0.1")
    keys += [store.key("case", **CAUSES)]
    monkeypatch.undo()
    assert len(set(keys)) == len(keys)
    assert store.key("case", **dict(reversed(CAUSES.items()))) == keys[0]
    assert store.key("case", **{**CAUSES, "prompt": (3, 5)}) == keys[0]


def test_what_json_would_merge_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for wrong in ({1: 2}, {"a": [{None: 2}]}, object(), torch.ones(1)):
        with pytest.raises(TypeError):
            store.key("case", x=wrong)
    with pytest.raises(ValueError, match="JSON"):
        store.key("case", x=float("nan"))
    for kind in ("", "Case", "../x", "a/b"):
        with pytest.raises(ValueError, match="kind="):
            store.key(kind, x=1)
    assert canonical({"b": 1, "a": (1.0, "ü")}) == '{"a":[1.0,"ü"],"b":1}'


def test_interleaved_results_are_never_exchanged(tmp_path: Path) -> None:
    """Every combination of causes gets its own result, whatever the order of writing."""
    store = Store(tmp_path)
    causes = [
        dict(zip(("prompt", "model", "rules", "mass"), values, strict=True))
        for values in itertools.product([[1, 2], [12]], ["m", "n"], ["a", "b"], [0.8, 0.9])
    ]
    for n, one in enumerate(causes[::2] + causes[1::2]):
        store.put(store.key("case", **one), {"causes": one}, {"n": torch.tensor([n])})
        for other in causes:
            key = store.key("case", **other)
            if store.has(key):
                assert store.get(key).record == {"causes": other}
    assert len(store.keys("case")) == len(causes)


def test_a_file_under_another_name_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    one, other = store.key("case", x=1), store.key("case", x=2)
    store.put(one, {"x": 1})
    store.path(other).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(store.path(one), store.path(other))
    with pytest.raises(FileFormatError, match="other causes") as caught:
        store.get(other)
    assert str(store.path(other)) in str(caught.value)
    assert store.get(one).record == {"x": 1}


def test_every_damage_is_noticed(tmp_path: Path) -> None:
    """Cut off anywhere, or with any byte changed, a file is refused or reads as it was."""
    store = Store(tmp_path)
    key = store.key("case", x="y")
    store.put(key, {"value": 1}, {"t": torch.arange(8.0)})
    path = store.path(key)
    whole = path.read_bytes()
    for cut in range(0, len(whole), 7):
        path.write_bytes(whole[:cut])
        with pytest.raises(FileFormatError, match=path.name):
            store.get(key)
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            entry = store.get(key)
        except FileFormatError as error:
            assert path.name in str(error)  # noqa: PT017
        else:  # a byte of padding, or of the notes
            assert (entry.record, entry.what["x"]) == ({"value": 1}, "y")
            assert torch.equal(entry.tensors["t"], torch.arange(8.0))
    store.put(key, {"value": 1}, {"t": torch.arange(8.0)})
    entry = store.get(key)
    assert entry.record == {"value": 1}
    assert torch.equal(entry.tensors["t"], torch.arange(8.0))


def test_another_version_is_refused_with_what_to_do(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    marker = store.folder / "store.json"
    data = json.loads(marker.read_text())
    for version in (data["version"] + 1, 0, None, "1"):
        marker.write_text(json.dumps({**data, "version": version}))
        with pytest.raises(FileFormatError, match="Name another folder under store:") as caught:
            Store(store.folder)
        assert f"format version {version}" in str(caught.value)
    for content in ("{", "[]", "{}", '{"format": "other", "version": 1}'):
        marker.write_text(content)
        with pytest.raises(FileFormatError, match="s"):
            Store(store.folder)
    marker.write_text(json.dumps(data))
    Store(store.folder)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(FileFormatError, match="not empty"):
        Store(tmp_path)
    with pytest.raises(NotADirectoryError):
        Store(tmp_path / "thesis.tex")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_error_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    key = store.key("case", x=1)
    store.put(key, {"v": 1})
    with pytest.raises(TypeError):
        store.put(key, {"v": object()})
    import safetensors.torch

    def interrupted(tensors: object, path: Path, metadata: object) -> None:  # noqa: ARG001
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.put(key, {"v": 2})
    assert store.get(key).record == {"v": 1}
    assert not list(tmp_path.rglob(".*"))


def test_the_index_is_derived(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.index().empty
    keys = [store.key("case", rules=r, ids=[1, n], n=n) for n in (1, 2) for r in "ab"]
    keys.append(store.key("chunk", benchmark="demo", n="two"))
    for key in keys:
        store.put(key, {})
    frame = store.index()
    assert sorted(frame["key"]) == sorted(keys)
    assert frame.loc[frame["kind"] == "case", "rules"].value_counts().to_dict() == {"a": 2, "b": 2}
    assert (frame["error"] == "").all()
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "index.parquet"), frame)
    (tmp_path / "index.parquet").unlink()
    store.path(keys[0]).write_bytes(b"x")
    again = store.index().set_index("key")
    assert "safetensors" in again.loc[keys[0], "error"]
    assert len(again) == 5
    assert all((tmp_path / file).is_file() for file in again["file"])


def test_what_killed_processes_left_is_swept_after_a_day(tmp_path: Path) -> None:
    import os
    import time

    store = Store(tmp_path)
    key = store.key("case", x=1)
    store.put(key, {})
    folder = store.path(key).parent
    old, new = folder / ".old.tmp", folder / ".new.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    yesterday = time.time() - 25 * 3600
    os.utime(old, (yesterday, yesterday))
    assert store.sweep() == 1
    assert [path.exists() for path in (old, new, store.path(key))] == [False, True, True]


def _write_many(folder: Path, worker: int) -> None:
    torch.set_num_threads(1)
    store = Store(folder)
    for n in range(40):
        store.put(
            store.key("case", n=n), {"n": n}, {"t": torch.full((500,), float(n))}, {"by": worker}
        )


@pytest.mark.slow
def test_many_writers_of_the_same_keys(tmp_path: Path) -> None:
    """Readers see whole files at any time."""
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write_many, args=(tmp_path / "s", w)) for w in range(2)]
    for worker in workers:
        worker.start()
    read = 0
    while any(worker.is_alive() for worker in workers):
        if (tmp_path / "s" / "store.json").exists():
            store = Store(tmp_path / "s")
            for n in range(40):
                if store.has(key := store.key("case", n=n)):
                    assert torch.equal(store.get(key).tensors["t"], torch.full((500,), float(n)))
                    read += 1
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert read
    assert len(Store(tmp_path / "s").keys("case")) == 40
    assert not list(tmp_path.rglob(".*.tmp"))
    assert isinstance(store.key("case", n=1), Key)
