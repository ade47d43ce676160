"""The command ``tokens``: the table of ``answer_table``, and a command that explains a row."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from support.cli_runs import PROMPT, TEXT, USAGE, Run

import tl_contrastive_lrp as clrp

ANSWER = " c d a b"


def asked(folder: Path, *more: object) -> tuple[object, ...]:
    return ("tokens", "--model", folder, "--prompt", PROMPT, "--answer", ANSWER, *more)


def test_the_table_is_that_of_the_library(run: Run, folder: Path, bridge: Any) -> None:
    wanted = clrp.answer_table(bridge, PROMPT, ANSWER)
    reply = run(*asked(folder, "--json")).json
    assert reply["status"] == "listed"
    assert list(reply["answer"][0]) == list(wanted.columns)
    for row, same in zip(reply["answer"], wanted.to_dict("records"), strict=True):
        assert row["id"] == same["id"]
        assert row["delta"] == pytest.approx(same["delta"], abs=1e-6)
    assert reply["row"] == int(wanted["delta"].to_numpy().argmax())
    done = run(*asked(folder))
    assert (done.code, done.err) == (0, "")
    lines = [line.split() for line in done.out.splitlines()]
    printed = [line for line in lines if line and re.fullmatch(r"[+-][\d.]+", line[-1])]
    assert [float(x[-1]) for x in printed] == pytest.approx(wanted["delta"].tolist(), abs=6e-4)
    assert done.out.endswith(reply["command"] + "\n")


def test_help_names_every_key(run: Run, folder: Path) -> None:
    reply = run(*asked(folder, "--json")).json
    text = run("tokens", "--help").out
    keys = {*reply, *reply["answer"][0]}
    assert [key for key in keys if not re.search(rf"\b{key}\b", text)] == []


@pytest.mark.parametrize("more", [(), ("--chat",), ("--chat", "--system", "b"), ("--no-bos",)])
@pytest.mark.parametrize("row", [0, 3])
def test_the_command_explains_that_token(
    run: Run, folder: Path, row: int, more: tuple[str, ...]
) -> None:
    """Typed as printed, it explains the same ids at the position before the token."""
    reply = run(*asked(folder, "--row", row, "--json", *more)).json
    words = shlex.split(reply["command"])
    explained = run(*words[1:], "--json").json
    one = reply["answer"][row]
    assert explained["pos"] == one["pos"] - 1
    assert explained["tokens"][one["pos"]]["id"] == one["id"]
    pair = {explained["target"]["ids"][0], explained["contrast"]["ids"][0]}
    assert pair == {one["id"], one["alternative_id"]}
    assert explained["delta"] == pytest.approx(abs(one["delta"]), abs=1e-4)
    assert explained["target"]["is_top"]


def test_tiles_and_a_file(run: Run, folder: Path) -> None:
    plain = run(*asked(folder, "--json")).json
    Path("p.txt").write_text(PROMPT, encoding="utf-8")
    tiled = run(
        "tokens", "--model", folder, "--prompt-file", "p.txt", "--answer", ANSWER, "--json",
        "--memory", "tiled", "--tile", 3,
    ).json  # fmt: skip
    for a, b in zip(plain["answer"], tiled["answer"], strict=True):
        assert a["logit"] == pytest.approx(b["logit"], abs=1e-4)
    assert "--memory tiled --tile 3" in tiled["command"]
    assert "--prompt-file p.txt" in tiled["command"]


def test_refusals(run: Run, folder: Path) -> None:
    base = ("tokens", "--model", folder, "--prompt", PROMPT)
    for arguments, code, words in (
        (base, USAGE, "--answer"),
        (asked(folder, "--system", "x"), USAGE, "go with --chat"),
        (("tokens", "--prompt", "a", "--answer", "b"), USAGE, "--model"),
        (asked(folder, "--prompt-file", "x"), USAGE, "either --prompt or --prompt-file"),
        (asked(folder, "--row", 40), TEXT, "the answer has"),
        (asked(folder, "--tile", 3, "--memory", "plain"), USAGE, "--tile"),
    ):
        done = run(*arguments)
        assert done.code == code
        assert words in re.sub(r"[\s│]+", " ", done.err)


def test_a_page_with_the_explanations(run: Run, folder: Path, bridge: Any, tmp_path: Path) -> None:
    path = tmp_path / "answer.html"
    reply = run(*asked(folder, "--out", path, "--explain", 2, "--json")).json
    found = clrp.explain_answer(bridge, PROMPT, ANSWER, most=2)
    assert reply["explained"] == list(found.results)
    page = path.read_text(encoding="utf-8")
    assert page.count("<iframe") == 2
    done = run(*asked(folder, "--out", path))
    n = len(reply["answer"])
    assert f"explains {min(8, n)} of {n} tokens" in done.out
    for arguments, words in (
        (asked(folder, "--explain", 2), "--explain goes with --out"),
        (asked(folder, "--out", "page.txt"), "--out"),
        (asked(folder, "--out", path, "--explain", 0), "--explain"),
    ):
        done = run(*arguments)
        assert done.code == USAGE
        assert words in re.sub(r"[\s│]+", " ", done.err)
    assert run(*asked(folder, "--json")).json["explained"] == []


def test_a_page_costs_no_second_list(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table that is printed is the page's own, also with a row of one's own."""
    room = importlib.import_module("tl_contrastive_lrp.attribution.answer_table")
    real, ranges = room.logits_between, list[Any]()

    def counted(model: Any, tokens: Any, bounds: Any, *rest: Any, **more: Any) -> Any:
        ranges.append(bounds)
        return real(model, tokens, bounds, *rest, **more)

    plain = run(*asked(folder, "--row", 2, "--json")).json
    monkeypatch.setattr(room, "logits_between", counted)
    paged = run(*asked(folder, "--row", 2, "--out", tmp_path / "answer.html", "--json")).json
    assert len(ranges) == 1
    assert paged["answer"] == plain["answer"]
    assert paged["row"] == 2
    assert paged["command"] == plain["command"]
    done = run(*asked(folder, "--row", 40, "--out", tmp_path / "none.html"))
    assert (done.code, len(ranges)) == (TEXT, 1)
    assert not (tmp_path / "none.html").exists()
