"""The labelling page in a browser: keys, progress, downloads, imports, and hostile texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.browser import HOSTILE, browser, visit
from support.studies import made_up_study

from tl_contrastive_lrp.render.text import visible
from tl_contrastive_lrp.study.criteria import automatic_label
from tl_contrastive_lrp.study.label_page import label_page
from tl_contrastive_lrp.study.labels import read_labels

# The page's own keys; blobs are caught where the browser would save them.
TOOLS = """
  const wait = (ms = 120) => new Promise(done => setTimeout(done, ms));
  const idle = async () => {
    do await wait(30); while (one('#case').getAttribute('aria-busy') === 'true');
  };
  const one = (what) => document.querySelector(what);
  const press = async (key) => {
    (document.activeElement || document.body).dispatchEvent(
      new KeyboardEvent('keydown', {key, bubbles: true, cancelable: true}));
    await idle();
  };
  const name = (text) => {
    one('#labeller').value = text;
    one('#labeller').dispatchEvent(new Event('input'));
  };
  // The made-up clock does not wait for reading files and blobs, so their texts are at hand.
  let saved = null, given = '';
  window.Blob = class extends Blob {
    constructor(parts, ...rest) { super(parts, ...rest); this.words = parts.join(''); }
  };
  URL.createObjectURL = (blob) => { saved = blob; return '#'; };
  File.prototype.text = async () => given;
  const download = async () => { saved = null; await press('d'); return saved && saved.words; };
  const give = async (text) => {
    given = text;
    const input = one('#import'), files = new DataTransfer();
    files.items.add(new File([text], 'labels.jsonl'));
    input.files = files.files;
    one('#message').textContent = '';
    input.dispatchEvent(new Event('change'));
    for (let i = 0; i < 20 && !one('#message').textContent; i++) await wait();
    return one('#message').textContent;
  };
  const title = () => one('#title').textContent;
  const auto = () => one('#auto').textContent;
  const message = () => one('#message').textContent;
"""


def asked(tmp_path: Path, body: str, **given: Any) -> Any:
    results = made_up_study(5, hostile=given.pop("hostile", False), people=())
    html = label_page(results, tmp_path / "label.html", **given).read_text(encoding="utf-8")
    return visit(tmp_path, html, f"(async () => {{{TOOLS}await idle();{body}}})()", budget=60_000)


@browser
def test_labels_by_keyboard_are_read_back(tmp_path: Path) -> None:
    seen = asked(
        tmp_path,
        """
      const hidden = auto(), first = title();
      await press('1'); await press('u'); await press('Enter');
      const nameless = message();
      name('Ada');
      await press('Enter');                       // leaves the name's field
      await press('Enter');
      const second = title();
      await press('3'); await press('t');
      document.activeElement.value = 'odd \\u2028 one';
      document.activeElement.dispatchEvent(new Event('input', {bubbles: true}));
      await press('Enter');
      const third = title();
      await press('Enter');                       // no outcome chosen
      const unchosen = message();
      await press('ArrowLeft'); await press('ArrowLeft');
      const back = title(), shown = auto();
      await press('2'); await press('n'); await press('Enter');
      return {hidden, first, nameless, second, third, unchosen, back, shown,
              count: one('#count').textContent, labels: await download(),
              kept: Object.values(localStorage).join('')};
    """,
    ).probe
    assert "hidden" in seen["hidden"]
    assert seen["nameless"].startswith("Write your name")
    assert seen["unchosen"] == "Choose an outcome first: 1, 2 or 3."
    assert [seen[k].split(".")[0] for k in ("first", "second", "third", "back")] == list("1231")
    assert seen["shown"].startswith(("Automatic label", "There is no automatic"))
    assert seen["count"] == "2 of 5 labelled"
    (tmp_path / "labels.jsonl").write_text(seen["labels"], encoding="utf-8")
    labels = read_labels(tmp_path / "labels.jsonl")
    assert [(la.outcome, la.pattern, la.note) for la in labels] == [
        ("NC-IA+M-AG", None, ""),
        ("NC-IA+AG", None, "odd \u2028 one"),
    ]
    assert {label.labeller for label in labels} == {"Ada"}
    assert all(label.date.endswith("Z") for label in labels)
    assert labels[0].case_id == seen["first"].split(". ")[1]
    assert "Ada" in seen["kept"]


@browser
def test_enter_confirms_the_automatic_label_unless_it_is_hidden(tmp_path: Path) -> None:
    seen = asked(
        tmp_path,
        """
      name('Bo');
      const said = [];
      for (let i = 0; i < 5; i++) {
        said.push(auto());
        await press('Enter');
        await press('ArrowRight');
      }
      return {said, labels: await download()};
    """,
        blind=False,
    ).probe
    results = made_up_study(5, people=())
    expected = {
        case.id: automatic_label(case, results.analysis(case.id, "small", "attnlrp"))  # type: ignore[arg-type]
        for case in results.cases
    }
    expected = {id: label for id, label in expected.items() if label is not None}
    assert expected
    rows = [json.loads(line) for line in (seen["labels"] or "").splitlines()]
    assert {row["case_id"]: (row["outcome"], row["pattern"]) for row in rows} == {
        id: (label.outcome, label.pattern) for id, label in expected.items() if label
    }


@browser
def test_imports_are_whole_or_refused(tmp_path: Path) -> None:
    seen = asked(
        tmp_path,
        """
      const row = (more) => JSON.stringify({version: 1, case_id: 'math/1', labeller: 'Cy',
                                            outcome: 'M-IA', pattern: 'both', note: 'n', ...more});
      const answers = [];
      for (const bad of ['{', row({case_id: 'math/77'}), row({outcome: 'no'}), row({version: 9}),
                         row({pattern: '<b>'}), row({labeller: 'Di'})]) {
        answers.push(await give(row({}) + '\\n' + bad));
      }
      const nothing = one('#count').textContent;
      const good = await give(row({}) + '\\n\\n' + row({case_id: 'ifeval/2', pattern: null}));
      return {answers, nothing, good, count: one('#count').textContent,
              name: one('#labeller').value, labels: await download()};
    """,
    ).probe
    assert all(words.startswith("Nothing was imported") for words in seen["answers"])
    assert "line 2" in seen["answers"][0]
    assert "math/77" in seen["answers"][1]
    assert seen["nothing"] == "0 of 5 labelled"
    assert seen["good"] == "2 labels imported."
    assert seen["count"] == "2 of 5 labelled"
    assert seen["name"] == "Cy"
    assert len(seen["labels"].splitlines()) == 2


@browser
def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    page = label_page(made_up_study(5, hostile=True), tmp_path / "label.html")
    html = page.read_text(encoding="utf-8")
    alone = visit(tmp_path, html)
    assert not alone.pwned
    assert alone.requests == []
    assert 'id="count" aria-live="polite">0 of 5' in alone.dom  # it ran under its own policy
    assert 'class="t' in alone.dom
    seen = asked(
        tmp_path,
        """
      name('A"><img src=x onerror=document.documentElement.dataset.pwned=1>');
      const shown = [...document.querySelectorAll('.t')].map(e => e.textContent);
      for (let i = 0; i < 5; i++) { await press('1'); await press('b'); await press('Enter'); }
      return {shown, labels: await download()};
    """,
        hostile=True,
    )
    assert not seen.pwned
    texts = [visible(text) for text in HOSTILE]
    assert seen.probe["shown"] == (texts * 3)[: len(seen.probe["shown"])]
    ids = {json.loads(line)["case_id"] for line in seen.probe["labels"].splitlines()}
    assert ids == {case.id for case in made_up_study(5, hostile=True).cases}
