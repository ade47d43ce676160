"""The command line: what it prints, writes and returns, on tiny local models."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.cli_runs import PROMPT, ROOT, Run, typed_next, words
from truth import families

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.cli import errors as cli_errors
from tl_contrastive_lrp.cli import retype
from tl_contrastive_lrp.cli import terminal as cli_terminal
from tl_contrastive_lrp.cli.graph import GraphOptions
from tl_contrastive_lrp.cli.main import ExplainOptions
from tl_contrastive_lrp.cli.retype import retyped

# ---- explaining --------------------------------------------------------------------------------


def test_explain_prints_a_table_and_writes_a_report(run: Run, folder: Path, bridge: Any) -> None:
    done = run(
        "explain", "--model", folder, "--prompt", PROMPT, "--target", " a", "--contrast", " b",
        "--top", 9, "--out", "r.html",
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    result = clrp.attribute(bridge, PROMPT, target=" a", contrast=" b")
    lines = [line.split() for line in done.out.splitlines()]
    table = [line for line in lines if line and line[0].isdigit() and len(line) > 3]
    assert [int(line[0]) for line in table] == result.top(9)["pos"].tolist()
    assert {np.sign(value) for value in result.tokens.tolist()} >= {-1, 1}
    for line in table:
        assert float(line[-3]) == pytest.approx(float(result.tokens[int(line[0])]), abs=5.1e-5)
    assert f"= {result.delta:+.4f}" in done.out
    assert "Positive relevance pushes towards « a», negative towards « b»." in done.out
    assert "Report: r.html" in done.out
    html = Path("r.html").read_text(encoding="utf-8")
    for i, text in enumerate(result.str_tokens):
        assert f'data-i="{i}"' in html
        assert text.strip().replace("<", "&lt;").replace(">", "&gt;") in html
    assert str(folder) in html
    assert "after the last token" in html


def test_json_is_one_object_and_agrees_with_attribute(run: Run, folder: Path, bridge: Any) -> None:
    done = run(
        "explain", "--model", folder, "--prompt", PROMPT, "--target", " a", "--target", "id:9",
        "--contrast", " b", "--rules", "cplrp", "--pos", -3, "--json", "--save", "r.safetensors",
        "--out", "r.html", "--device", "cpu",
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    reply = done.json
    result = clrp.attribute(bridge, PROMPT, target={" a", 9}, contrast=" b", rules="cplrp", pos=-3)
    assert [row["relevance"] for row in reply["tokens"]] == result.tokens.tolist()
    assert [row["id"] for row in reply["tokens"]] == result.token_ids.tolist()
    assert [row["token"] for row in reply["tokens"]] == list(result.str_tokens)
    assert [row["greyed"] for row in reply["tokens"]] == result.greyed.tolist()
    assert (
        reply["delta"]
        == result.delta
        == pytest.approx(reply["target"]["logit"] - reply["contrast"]["logit"], rel=1e-5)
    )
    assert reply["share_to_tokens"] * reply["delta"] == pytest.approx(
        sum(row["relevance"] for row in reply["tokens"]), rel=1e-5
    )
    n = len(result.str_tokens)
    assert (reply["status"], reply["rules"], reply["pos"]) == ("explained", "cplrp", n - 3)
    assert reply["target"]["tokens"] == ["e", " a"]
    assert reply["target"]["is_top"] is False
    logits = bridge(bridge.to_tokens(PROMPT))[0, -3]
    assert [row["id"] for row in reply["candidates"]] == logits.topk(10).indices.tolist()
    assert [row["site"] for row in reply["ledger"]][1:] == list(result.sites)
    # The saved file is the result; the page says which position it explains.
    loaded = clrp.Attribution.load("r.safetensors")
    assert torch.equal(loaded.resid, result.resid)
    assert torch.equal(loaded.heads, result.heads)
    assert (reply["saved"], reply["report"]) == ("r.safetensors", "r.html")
    html = Path("r.html").read_text(encoding="utf-8")
    assert f"prediction at position {n - 3}" in words(html)


def test_without_target_the_top_token_is_explained(run: Run, folder: Path, bridge: Any) -> None:
    top = int(bridge(bridge.to_tokens(PROMPT))[0, -1].argmax())
    other = "id:5" if top != 5 else "id:6"
    reply = run(
        "explain", "--model", folder, "--prompt", PROMPT, "--contrast", other, "--json",
        "--out", "r.html",
    ).json  # fmt: skip
    assert reply["target"]["ids"] == [top]
    assert reply["target"]["is_top"] is True
    assert "The model wrote" in Path("r.html").read_text(encoding="utf-8")


def test_signs_are_said_when_the_model_prefers_the_contrast(run: Run, folder: Path) -> None:
    common = ("explain", "--model", folder, "--prompt", PROMPT)
    first = run(*common, "--json").json["candidates"]
    low, high = (f"id:{first[rank]['id']}" for rank in (3, 0))
    done = run(*common, "--target", low, "--target", "id:4", "--contrast", high)
    assert "Δℓ is negative: the model prefers" in done.out
    assert "mean logit of {" in done.out
    assert "negative" not in run(*common, "--contrast", low).out.split("Positive")[0]


def test_save_html_of_a_result_says_only_what_is_so(bridge: Any, tmp_path: Path) -> None:
    table = clrp.next_token_table(bridge, PROMPT, pos=2)
    first, second = (int(i) for i in table["id"][:2])
    result = clrp.attribute(bridge, PROMPT, target=first, contrast=second, pos=2)
    page = result.save_html(tmp_path / "r.html").read_text(encoding="utf-8")
    assert "The model wrote" in page  # the result knows that its target is the model's top token
    assert "prediction at position 2" in words(page)
    page = result.save_html(tmp_path / "r.html", candidates=table).read_text(encoding="utf-8")
    assert "The model wrote" in page
    assert "could have written" in page
    other = clrp.attribute(bridge, PROMPT, target=second, contrast=first, pos=2)
    page = other.save_html(tmp_path / "r.html", candidates=table).read_text(encoding="utf-8")
    assert "The model wrote" not in page
    top = clrp.attribute(bridge, PROMPT, clrp.top_logit())
    assert "top logit" in top.save_html(tmp_path / "r.html").read_text(encoding="utf-8")


def test_a_first_token_that_is_not_special_is_greyed_too(run: Run) -> None:
    common = ("explain", "--model", families.saved("qwen3"), "--prompt", "b c", "--contrast", "z")
    rows = run(*common, "--json").json["tokens"]
    assert [(row["token"], row["greyed"]) for row in rows] == [("b", True), (" c", False)]
    assert re.search(r"^ +0 +b \* ", run(*common).out, re.MULTILINE)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_dtype_reaches_the_model(run: Run, folder: Path, dtype: str) -> None:
    reply = run(
        "explain", "--model", folder, "--prompt", "a b", "--contrast", "z", "--dtype", dtype,
        "--json",
    ).json  # fmt: skip
    assert reply["dtype"] == dtype


# ---- no contrast -------------------------------------------------------------------------------


def test_without_contrast_candidates_and_a_command_that_runs(
    run: Run, folder: Path, bridge: Any
) -> None:
    quoted = 'it\'s "a" $HOME `b`\n c'
    done = run(
        "explain", "--model", folder, "--prompt", quoted, "--top", 3, "--rules", "gim",
        "--out", "my page.html",
    )  # fmt: skip
    logits = bridge(bridge.to_tokens(quoted))[0, -1].double()
    top = logits.topk(10)
    rows = [line.split() for line in done.out.splitlines() if re.match(r"\s*\d+ ", line)]
    assert [int(row[0]) for row in rows] == list(range(10))
    assert [int(row[-5]) for row in rows] == top.indices.tolist()
    assert [float(row[-4]) for row in rows] == pytest.approx(top.values.tolist(), abs=6e-4)
    percent = (100 * logits.softmax(-1)[top.indices]).tolist()
    assert [float(row[-3]) for row in rows] == pytest.approx(percent, abs=6e-3)
    assert not os.path.exists("my page.html")

    command = shlex.split(typed_next(done))
    assert command[0] == retype.PROGRAM
    again_done = run(*command[1:], "--json")
    assert again_done.code == 0
    reply = again_done.json
    assert reply["target"]["ids"] == [int(top.indices[0])]
    assert reply["contrast"]["ids"] == [int(top.indices[1])]
    assert reply["rules"] == "gim"
    assert len(reply["top"]) == 3
    assert [row["id"] for row in reply["tokens"]] == bridge.to_tokens(quoted)[0].tolist()
    assert os.path.exists("my page.html")


def test_needs_contrast_as_json(run: Run, folder: Path) -> None:
    done = run("explain", "--model", folder, "--prompt", PROMPT, "--target", "z", "--json")
    assert done.code == cli_errors.Code.PROMPT
    assert done.json["status"] == "needs_contrast"
    assert len(done.json["candidates"]) == 10
    reply = run(*shlex.split(done.json["command"])[1:]).json
    assert reply["target"]["tokens"] == ["z"]
    assert reply["contrast"]["ids"] == [done.json["candidates"][0]["id"]]


@pytest.mark.slow
def test_the_command_runs_in_a_real_shell(run: Run, folder: Path, tmp_path: Path) -> None:
    """As a newcomer does it: run, copy what it says to type, run that."""
    program = tmp_path / "bin" / retype.PROGRAM
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m tl_contrastive_lrp "$@"\n'
    )
    program.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PYTHONIOENCODING": "ascii",  # a terminal without Δ
    }
    first = run("explain", "--model", folder, "--prompt-file", "-", stdin=b"a 'b'\n")
    done = subprocess.run(
        ["sh", "-c", typed_next(first)], stdin=subprocess.DEVNULL, env=environment, cwd=tmp_path,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == cli_errors.Code.DONE, done.stderr
    assert "Positive relevance pushes towards" in done.stdout
    assert done.stderr == ""


def test_commands_keep_numbers_that_equal_false() -> None:
    options = GraphOptions(model="m", prompt="a", pos=0, threshold=0.0, heads=True, quiet=False)
    command = retyped("graph", options, "a", target=[], contrast=[])
    assert command == f"{retype.PROGRAM} graph --model m --prompt a --pos 0 --heads --threshold 0.0"


@pytest.mark.parametrize(
    "text", ["-x", " -x", "--", "it's", "a\nb", "a\tb\x1b[0m\\'", "«é»", "$(x)"]
)
def test_commands_keep_any_text(text: str) -> None:
    options = ExplainOptions(model="m", prompt=text)
    command = retyped("explain", options, text, target=[text], contrast=["b"])
    printed = cli_terminal.plain(command)
    assert printed == command, "what is printed is what runs"
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, check=True
    )
    arguments = [a.decode() for a in done.stdout.split(b"\0")[:-1]]
    joined = "\0".join(arguments).replace("--prompt=", "--prompt\0").replace("=-", "\0-")
    assert joined.split("\0")[:7] == [
        retype.PROGRAM, "explain", "--model", "m", "--prompt", text, "--target",
    ]  # fmt: skip
