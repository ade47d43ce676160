"""The report in a browser: cases open, filters count right, hostile texts stay texts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from support.browser import HOSTILE, browser, visit
from support.studies import demo_study, made_up_checks, made_up_study

from tl_contrastive_lrp.render.text import visible
from tl_contrastive_lrp.study.report import report
from tl_contrastive_lrp.study.sizes import segment_values

TOOLS = """
  const wait = (ms) => new Promise(done => setTimeout(done, ms));
  const all = (what) => [...document.querySelectorAll(what)];
  const open = async (i) => {
    const row = all('details.case')[i];
    row.open = true;
    for (let k = 0; k < 100 && !row.querySelector('.t'); k++) await wait(50);
    return row;
  };
  const choose = (id, words) => {
    const box = document.getElementById(id);
    const option = [...box.options].find(o => o.textContent.startsWith(words));
    box.value = option ? option.value : 'missing';
    box.dispatchEvent(new Event('input'));
    return all('details.case').map((row, i) => row.hidden ? -1 : i).filter(i => i >= 0);
  };
"""


def asked(tmp_path: Path, study: Any, body: str) -> Any:
    report(study, tmp_path / "out.html")
    html = (tmp_path / "out.html").read_text(encoding="utf-8")
    return visit(tmp_path, html, f"(async () => {{{TOOLS}{body}}})()", budget=60_000)


@browser
def test_filters_show_the_cases_that_they_name(tmp_path: Path) -> None:
    study = made_up_study(12)
    seen = asked(
        tmp_path,
        study,
        """
      const found = {};
      found.math = choose('benchmark', 'math');
      choose('benchmark', 'all');
      choose('labeller', 'Bo');
      found.bo = choose('outcome', 'NC-IA+AG');
      found.pattern = choose('pattern', 'both');
      found.words = document.getElementById('shown').textContent;
      for (const id of ['labeller', 'outcome', 'pattern']) document.getElementById(id).value = '';
      found.up = choose('segment', 'instruction > 0');
      found.down = choose('segment', 'instruction < 0');
      return found;
    """,
    ).probe
    cases = {case.id: i for i, case in enumerate(study.cases)}
    assert seen["math"] == [i for i, case in enumerate(study.cases) if case.benchmark == "math"]
    bo = [la for la in study.labels if la.labeller == "Bo" and la.outcome == "NC-IA+AG"]
    assert seen["bo"] == [cases[la.case_id] for la in bo]
    assert seen["pattern"] == [cases[la.case_id] for la in bo if la.pattern == "both"]
    assert seen["words"] == f"{len(seen['pattern'])} of 12 cases"
    signs = [
        segment_values(study.analysis(c.id, "small", "attnlrp"))["instruction"] > 0  # type: ignore[arg-type]
        for c in study.cases
    ]
    assert seen["up"] == [i for i, sign in enumerate(signs) if sign]
    assert seen["down"] == [i for i, sign in enumerate(signs) if not sign]


@browser
def test_verdicts_are_filtered_and_follow_the_rule_set_shown(tmp_path: Path) -> None:
    study = made_up_study(12)
    checks = made_up_checks(study)
    seen = asked(
        tmp_path,
        replace(study, checks=checks),
        """
      const options = [...document.getElementById('verdict').options];
      const found = {options: options.map(o => o.textContent)};
      found.weak = choose('verdict', 'weak (attnlrp)');
      found.none = choose('verdict', 'not checked (gradient)');
      choose('benchmark', 'ifeval');
      found.both = choose('verdict', 'supported (attnlrp)');
      choose('benchmark', 'all');
      found.all = choose('verdict', 'all');
      found.tags = all('.verdict').map(e => e.textContent);
      const row = await open(0), words = () => row.querySelector('p.check').textContent;
      found.first = words();
      row.querySelectorAll('.choices button')[1].click();
      found.second = words();
      (await open(1)).querySelectorAll('.choices button')[1].click();
      found.unchecked = all('p.check')[1].textContent;
      return found;
    """,
    ).probe
    verdicts = [checks[case.id, "attnlrp"].verdict for case in study.cases]
    assert seen["options"] == [
        "all", "supported (attnlrp)", "weak (attnlrp)", "contradicted (attnlrp)",
        "contradicted (gradient)", "not checked (gradient)",
    ]  # fmt: skip
    assert seen["weak"] == [i for i, verdict in enumerate(verdicts) if verdict == "weak"]
    assert seen["none"] == list(range(1, 12, 2))
    assert seen["both"] == [i for i in range(0, 12, 2) if verdicts[i] == "supported"]
    assert seen["all"] == list(range(12))
    assert seen["tags"] == verdicts
    sentence = checks[study.cases[0].id, "attnlrp"].sentence.removeprefix("supported: t")
    assert seen["first"].startswith(f"supported T{sentence}")
    assert seen["second"].startswith("contradicted The strongest token holds 100 %")
    assert seen["unchecked"] == ""


@browser
def test_an_opened_case_shows_its_tokens_rule_sets_and_graph(tmp_path: Path) -> None:
    study = demo_study(3)
    seen = asked(
        tmp_path,
        study,
        """
      const before = all('.t').length, row = await open(1);
      const spans = [...row.querySelectorAll('.t')];
      const look = () => spans.map(e => getComputedStyle(e).backgroundColor);
      const colours = look();
      const texts = spans.map(e => e.textContent);
      const marked = spans.map((e, i) => e.classList.contains('m') ? i : -1);
      const readouts = spans.map((span) => {
        span.dispatchEvent(new MouseEvent('mouseover', {bubbles: true}));
        return row.querySelector('.readout').textContent;
      });
      row.querySelectorAll('.choices button')[1].click();
      const gradient = look();
      const nodes = row.querySelectorAll('.graph circle[data-n]').length;
      const circle = row.querySelector('.graph circle[data-n]');
      circle.dispatchEvent(new MouseEvent('mouseover', {bubbles: true}));
      const words = row.querySelector('.graph .r').textContent;
      const title = circle.querySelector('title').textContent;
      row.open = false;
      await wait(300);
      return {before, colours, texts, marked, readouts, gradient, nodes, words, title,
              after: all('.t').length};
    """,
    ).probe
    case = study.cases[1]
    found = study.analysis(case.id, "demo", "attnlrp")
    assert found is not None
    assert found.graph is not None
    assert seen["before"] == seen["after"] == 0
    assert seen["texts"] == [visible(text) for text in found.str_tokens]
    assert tuple(i for i in seen["marked"] if i >= 0) == case.decisive_positions
    counted = found.tokens.clone()
    counted[found.special] = 0
    counted[0] = 0
    strongest = int(counted.abs().argmax())
    sign = float(counted[strongest]) > 0
    assert seen["colours"][strongest] == ("rgb(168, 21, 41)" if sign else "rgb(28, 79, 150)")
    assert seen["colours"][0] == "rgb(228, 228, 231)"
    for i, words in enumerate(seen["readouts"]):
        shown = float(words.split(": ")[-1].split(" ")[0].replace("\u2212", "-").replace("+", ""))
        assert abs(shown - float(found.tokens[i])) < 0.0015 * float(counted.abs().max()) + 5e-4
    assert seen["gradient"] != seen["colours"]
    assert seen["nodes"] == len(found.graph.nodes)
    assert seen["words"] == seen["title"]


@browser
def test_hostile_texts_run_nothing_and_ask_for_nothing(tmp_path: Path) -> None:
    study = made_up_study(6, hostile=True)
    report(study, tmp_path / "out.html")
    alone = visit(tmp_path, (tmp_path / "out.html").read_text(encoding="utf-8"))
    assert not alone.pwned
    assert alone.requests == []
    assert "6 of 6 cases" in alone.dom  # its script ran under its own policy
    seen = asked(
        tmp_path,
        study,
        """
      for (let i = 0; i < 6; i++) await open(i);
      const row = all('details.case')[0];
      return [...row.querySelectorAll('.t')].map(e => e.textContent);
    """,
    )
    assert not seen.pwned
    assert seen.requests == []
    assert seen.probe == [visible(HOSTILE[i % len(HOSTILE)]) for i in range(26)]
