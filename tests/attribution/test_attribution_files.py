"""Attributions as files: the same again, and damaged or foreign files are named."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from truth.families import boot

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.errors import FileFormatError

TEXT = "a b c d e f"


@pytest.fixture(scope="module")
def result() -> clrp.Attribution:
    model = boot("gemma2", torch.float32)
    return clrp.attribute(model, TEXT, target="a", contrast=" b", neurons=True)


def _same(a: clrp.Attribution, b: clrp.Attribution) -> None:
    for field in dataclasses.fields(a):
        one, two = getattr(a, field.name), getattr(b, field.name)
        if isinstance(one, torch.Tensor):
            assert one.dtype == two.dtype, field.name
            assert torch.equal(one, two), field.name
        else:
            assert one == two, field.name
            assert type(one) is type(two), field.name


@pytest.mark.parametrize("neurons", [True, False])
@pytest.mark.parametrize("name", ["qwen3", "gpt2", "gemma2"])
def test_saved_and_loaded_is_the_same(name: str, neurons: bool, tmp_path: Path) -> None:
    model = boot(name, torch.float32)
    result = clrp.attribute(model, TEXT, target="a", contrast={6, 7}, neurons=neurons)
    path = result.save(tmp_path / "result.safetensors")
    assert path == tmp_path / "result.safetensors"
    loaded = clrp.Attribution.load(path)
    _same(result, loaded)
    assert str(loaded.coverage) == str(result.coverage)
    _same(result, clrp.Attribution.load(str(path)))


def test_odd_text_survives(result: clrp.Attribution, tmp_path: Path) -> None:
    words = ("\x00", "<script>", "é", "\u2028", "\U0001f600", "{}", "")
    odd = dataclasses.replace(result, str_tokens=words, target="{}", delta=float("nan"))
    loaded = clrp.Attribution.load(odd.save(tmp_path / "odd"))
    assert loaded.str_tokens == words
    assert math.isnan(loaded.delta)


def test_saving_again_replaces_the_file(result: clrp.Attribution, tmp_path: Path) -> None:
    path = result.save(tmp_path / "r")
    dataclasses.replace(result, model_name="other").save(path)
    assert clrp.Attribution.load(path).model_name == "other"
    assert [p.name for p in tmp_path.iterdir()] == ["r"]


def _rewritten(source: Path, target: Path, change: Any) -> Path:
    with safe_open(source, framework="pt") as file:
        meta = dict(file.metadata())
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    change(meta, tensors)
    save_file(tensors, target, metadata=meta)
    return target


def _data(edit: Any) -> Any:
    def change(meta: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:  # noqa: ARG001
        data = json.loads(meta["data"])
        edit(data)
        meta["data"] = json.dumps(data)

    return change


DAMAGE: dict[str, tuple[Any, str]] = {
    "newer": (lambda m, t: m.update(version="2"), "version 2"),  # noqa: ARG005
    "no version": (lambda m, t: m.pop("version"), "version"),  # noqa: ARG005
    "another format": (lambda m, t: m.update(format="x"), "no attribution"),  # noqa: ARG005
    "no data": (lambda m, t: m.pop("data"), "damaged"),  # noqa: ARG005
    "data is no JSON": (lambda m, t: m.update(data="{"), "damaged"),  # noqa: ARG005
    "data is a list": (lambda m, t: m.update(data="[]"), "damaged"),  # noqa: ARG005
    "no tokens": (lambda m, t: t.pop("tokens"), "damaged"),  # noqa: ARG005
    "no heads": (lambda m, t: t.pop("heads"), "damaged"),  # noqa: ARG005
    "no special": (lambda m, t: t.pop("special"), "damaged"),  # noqa: ARG005
    "short tokens": (lambda m, t: t.update(tokens=t["tokens"][:-1].clone()), "tokens"),  # noqa: ARG005
    "tokens of one dimension too many": (
        lambda m, t: t.update(tokens=t["tokens"][None].clone()),  # noqa: ARG005
        "tokens",
    ),
    "heads of one dimension": (lambda m, t: t.update(heads=t["tokens"].clone()), "heads"),  # noqa: ARG005
    "an unknown field": (_data(lambda d: d.update(colour="red")), "damaged"),
    "a missing field": (_data(lambda d: d.pop("delta")), "damaged"),
    "no ledger": (_data(lambda d: d.pop("ledger")), "damaged"),
    "a ledger row cut short": (_data(lambda d: d["ledger"]["rows"][0].pop("site")), "damaged"),
    "coverage is text": (_data(lambda d: d.update(coverage="all")), "damaged"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_and_foreign_files(result: clrp.Attribution, kind: str, tmp_path: Path) -> None:
    change, said = DAMAGE[kind]
    path = _rewritten(result.save(tmp_path / "good"), tmp_path / "bad", change)
    with pytest.raises(FileFormatError, match=said) as info:
        clrp.Attribution.load(path)
    assert str(path) in str(info.value)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_truncated_files(result: clrp.Attribution, share: float, tmp_path: Path) -> None:
    whole = result.save(tmp_path / "good").read_bytes()
    path = tmp_path / "cut"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(FileFormatError, match="cut"):
        clrp.Attribution.load(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff" * 100, pickle.dumps({"a": 1})], ids=str)
def test_foreign_bytes(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "foreign"
    path.write_bytes(content)
    with pytest.raises(FileFormatError):
        clrp.Attribution.load(path)


def test_other_safetensors_files(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "weights")
    with pytest.raises(FileFormatError, match="no attribution"):
        clrp.Attribution.load(tmp_path / "weights")


def test_no_file(tmp_path: Path, result: clrp.Attribution) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(FileNotFoundError, match=str(path)):
            clrp.Attribution.load(path)
    with pytest.raises(OSError, match="nowhere"):
        result.save(tmp_path / "nowhere" / "r")
