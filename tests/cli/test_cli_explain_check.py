"""``explain --check``: what it prints, writes and says as JSON is what ``result.check`` finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.cli_runs import PROMPT, Run, asked, typed_next, words

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.attribution.result import Attribution
from tl_contrastive_lrp.errors import PromptError, UncoveredComponentError


def explained(folder: Path, *more: object) -> tuple[object, ...]:
    return ("explain", *asked(folder, *more)[1:])


def checked(bridge: Any, **how: Any) -> clrp.MapCheck:
    result = clrp.attribute(bridge, PROMPT, target=" a", contrast=" b", progress=False)
    return result.check(bridge, progress=False, **how)


def test_the_verdict_is_printed_and_on_the_page(run: Run, folder: Path, bridge: Any) -> None:
    done = run(*explained(folder, "--check", "--out", "r.html", "--no-graph"))
    assert done.code == 0
    check = checked(bridge)
    assert f"Verdict: {check.sentence}" in words(done.out)
    assert "measured effect" in done.out
    effects = dict(zip(check.measured_at.tolist(), check.measured.tolist(), strict=True))
    rows = [line.split() for line in done.out.splitlines() if line.strip()[:1].isdigit()]
    assert rows
    for row in rows:
        effect = effects.get(int(row[0]))
        assert row[-1] == "-" if effect is None else abs(float(row[-1]) - effect) < 1e-3
    page = words(Path("r.html").read_text(encoding="utf-8"))
    assert "Does the map hold?" in page
    assert check.sentence[1:] in page
    assert "measured effect" in page


def test_json(run: Run, folder: Path, bridge: Any) -> None:
    value = run(*explained(folder, "--check", "--json")).json["check"]
    check = checked(bridge)
    assert (value["verdict"], value["sentence"]) == (check.verdict, check.sentence)
    assert set(value["statistics"]) == set(check.statistics)
    rows = [row for row in value["tokens"] if row["measured"] is not None]
    assert [row["pos"] for row in rows] == check.measured_at.tolist()
    for row, effect in zip(rows, check.measured.tolist(), strict=True):
        assert abs(row["measured"] - effect) < 1e-4
    assert run(*explained(folder, "--json")).json["check"] is None
    text = words(run("explain", "--help").out)
    for name in ("check", *value, *value["tokens"][0]):
        assert name in text, name


def test_a_set_of_tokens_can_be_checked(run: Run, folder: Path) -> None:
    assert run(*explained(folder, "--target", " c", "--check", "--json")).json["check"]["verdict"]


def test_it_is_part_of_the_command_to_type(run: Run, folder: Path) -> None:
    done = run("explain", "--model", folder, "--prompt", PROMPT, "--check")
    assert "--check" in typed_next(done).split()


def test_a_model_that_cannot_be_followed_is_measured(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Attribution.check

    def refusing(*arguments: Any, **options: Any) -> Any:
        if "window" not in options:
            raise UncoveredComponentError("cannot be followed")
        return real(*arguments, **options)

    monkeypatch.setattr(Attribution, "check", refusing)
    value = run(*explained(folder, "--check", "--json")).json
    assert value["check"]["verdict"]
    assert any("in a run of its own" in note for note in value["notes"])


@pytest.mark.parametrize(
    ("error", "said"),
    [(PromptError("Nothing to replace."), "Nothing to replace."),
     (torch.OutOfMemoryError("out of memory"), "not enough memory")],
)  # fmt: skip
def test_a_check_that_fails_does_not_cost_the_explanation(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise error

    plain = run(*explained(folder, "--json")).json
    monkeypatch.setattr(Attribution, "check", fails)
    done = run(*explained(folder, "--check", "--json", "--out", "r.html", "--no-graph"))
    assert done.code == 0
    assert done.json["check"] is None
    assert done.json["tokens"] == plain["tokens"]
    assert any("was not checked" in note and said in note for note in done.json["notes"])
    assert Path("r.html").is_file()
