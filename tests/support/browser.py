"""A browser to open pages in, a parser to look at them, and texts that try to break out of them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.parse
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from circuitsvis.utils.render import RenderedHTML

JOINER = "\u2060"
PWN = "document.documentElement.dataset.pwned=1"
HOSTILE = [
    "<|im_start|>",
    f"</script><img src=x onerror={PWN}>",
    f'<img/src="x"/onerror="{PWN}">',
    f'"><svg/onload={PWN}>',
    f"'/onmouseover='{PWN}",
    f"</style></title></code><script>{PWN}</script>",
    "<!--",
    "-->",
    "&lt;b&gt;",
    "&#60;script&#62;",
    "a\u2028b\u2029c",
    "{{ 7 * 7 }}{% raw %}",
    f"${{{PWN}}}`",
    "\\u003c/script\\u003e",
    "half \ud800 nul \x00",
    "\n",
    "    ",
    "\t",
    "",
    " <",
    "script>",
]


class Flat(HTMLParser):
    """What a parser makes of markup: tags with attributes, entities, text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=False)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.entities: list[str] = []
        self.text = ""
        self.other: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        self.other.append(tag)

    def handle_comment(self, data: str) -> None:
        self.other.append(data)

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_entityref(self, name: str) -> None:
        self.entities.append(name)

    handle_charref = handle_entityref


CHROMIUM = next(
    filter(
        None,
        map(
            shutil.which,
            ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"),
        ),
    ),
    None,
)
browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome on the PATH")


@dataclass(frozen=True)
class Visit:
    dom: str
    requests: list[str]
    probe: Any

    @property
    def pwned(self) -> bool:
        return "data-pwned" in self.dom


def visit(folder: Path, html: str, probe: str = "null", *, budget: int = 5000) -> Visit:
    """Open a page from disk; what it became, what it asked for, and a probe's answer.

    The probe is an expression, evaluated in the page once it has settled. A page with a probe
    loses its content security policy, so it shows what escaping alone achieves. The page's clock
    ends after ``budget`` milliseconds.
    """
    if probe != "null":
        html = re.sub(r"<meta http-equiv=[^>]*>", "", html)
        html = html.replace(
            "</body>",
            "<pre id=probe></pre><script>setTimeout(async () => {"
            "let answer; try { answer = await (" + probe + ") } catch (e) "
            "{ answer = String(e) } document.getElementById('probe').textContent = "
            "encodeURIComponent(JSON.stringify(answer)) }, 300)</script></body>",
        )
    file = folder / "page.html"
    file.write_text(html, encoding="utf-8")
    log = folder / "net.json"
    done = subprocess.run(
        [
            str(CHROMIUM),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--disable-dev-shm-usage",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={folder / 'profile'}",
            f"--log-net-log={log}",
            f"--virtual-time-budget={budget}",
            "--window-size=1200,900",
            "--dump-dom",
            file.as_uri(),
        ],
        capture_output=True,
        timeout=120,
        check=True,
    )
    dom = done.stdout.decode()
    net = json.loads(log.read_text(encoding="utf-8"))
    kinds = {number: name for name, number in net["constants"]["logEventTypes"].items()}
    # The browser's own errands (updates, clock) carry "not an origin"; a page's requests its own.
    requests = [
        event["params"]["url"]
        for event in net["events"]
        if kinds[event["type"]] == "URL_REQUEST_START_JOB"
        and event.get("params", {}).get("initiator", "not an origin") != "not an origin"
    ]
    found = re.search(r'<pre id="probe">(.*?)</pre>', dom)
    answer = json.loads(urllib.parse.unquote(found[1])) if found and found[1] else None
    return Visit(dom, requests, answer)


def document(body: str) -> str:
    return f"<!doctype html><html><head><meta charset=utf-8></head><body>{body}</body></html>"


# What probes of a long prompt use: waiting, its spans, whether one can be seen, searching.
TOOLS = """
  const wait = () => new Promise(done => setTimeout(done, 250));
  const all = (what) => [...document.querySelectorAll(what)];
  const one = (what) => document.querySelector(what);
  const size = () => document.querySelectorAll('*').length;
  const spans = () => all('.lrp-box .t');
  const token = (i) => one(`.lrp-box .t[data-i="${i}"]`);
  const seen = (i) => {
    const span = token(i), box = one('.lrp-box').getBoundingClientRect();
    if (!span || !span.checkVisibility()) return false;
    const at = span.getBoundingClientRect();
    return at.height > 0 && at.top >= Math.max(0, box.top)
      && at.bottom <= Math.min(innerHeight, box.bottom);
  };
  const now = () => all('.lrp-now').map(span => Number(span.dataset.i));
  const count = () => one('.lrp-count').textContent;
  const find = async (text) => {
    one('.lrp-query').value = text;
    one('.lrp-query').dispatchEvent(new Event('input'));
    await wait();
    return count();
  };
  const press = (key, more = {}) => document.activeElement.dispatchEvent(
    new KeyboardEvent('keydown', {key, bubbles: true, cancelable: true, ...more}));
  const enter = async (more = {}) => {
    one('.lrp-query').focus();
    press('Enter', more);
    await wait();
  };
"""


def probe(body: str, **given: int) -> str:
    """A probe for :func:`visit` of a page with a long prompt, with ``TOOLS`` and these numbers."""
    return f"(async () => {{const given = {json.dumps(given)};{TOOLS}{body}}})()"


def props(view: RenderedHTML) -> list[Any]:
    """The arguments of a view's drawing call: element id, properties, extra data."""
    found = re.search(r"\)\((\"circuits-vis-.*)\);$", view.script, re.DOTALL)
    assert found
    return list(json.loads(f"[{found[1]}]"))
