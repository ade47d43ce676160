"""HTML that carries its JavaScript and never uses the network, for circuitsvis and our own views.

circuitsvis' own ``RenderedHTML`` probes for a connection at every display and then imports its
bundle from a content delivery network. The wheel ships the same bundle, so the HTML made here
holds it inline (about 1.3 MB per view; :func:`page` holds it once for many views).
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import circuitsvis
from circuitsvis.utils.convert_props import convert_prop_type
from circuitsvis.utils.render import RenderedHTML
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from .scale import GREY
from .text import inline_script, script_json

# A swatch colour (or "" for none) and its words.
LegendLine = Sequence[tuple[str, str]]


class OfflineHTML(RenderedHTML):  # type: ignore[misc, unused-ignore]  # circuitsvis is untyped
    """A rendered object of circuitsvis whose only source is complete and local.

    Attributes:
        body: The markup of the view: legend, styles and the element it is drawn into.
        script: The JavaScript call that draws it, for a page that already holds the bundle.
    """

    def __init__(self, body: str, script: str) -> None:
        self.body = body
        self.script = script
        html = f"{body}<script>{bundle()}</script><script>{script}</script>"
        super().__init__(local_src=html, cdn_src=html)

    def _repr_html_(self) -> str:
        """The HTML for a notebook; unlike the parent's, made without a connection probe."""
        return str(self.local_src)


class PlainHTML(OfflineHTML):
    """A view of our own, which displays as circuitsvis' views do but does not carry their bundle.

    Attributes:
        body: The markup, which is readable without its script.
        script: JavaScript that makes it interactive.
    """

    def __init__(self, body: str, script: str) -> None:
        self.body = body
        self.script = script
        html = f"{body}<script>{script}</script>"
        RenderedHTML.__init__(self, local_src=html, cdn_src=html)


@lru_cache(maxsize=1)
def bundle() -> str:
    """The JavaScript of circuitsvis, which defines ``CircuitsVis``, ready for ``<script>``.

    Raises:
        RuntimeError: The installed circuitsvis does not ship it.
    """
    path = Path(circuitsvis.__file__).parent / "dist" / "cdn" / "iife.js"
    if not path.is_file():
        raise RuntimeError(
            f"circuitsvis {circuitsvis.__version__} came without its JavaScript bundle "
            f"({path}); reinstall it: pip install --force-reinstall circuitsvis"
        )
    source = path.read_text(encoding="utf-8")
    # Otherwise developer tools would look for the map next to the page.
    source = re.sub(r"^//# sourceMappingURL=.*$", "", source, flags=re.MULTILINE).strip()
    return inline_script(source)


@lru_cache(maxsize=1)
def templates() -> Environment:
    """The package's templates; every value inserted into them is escaped."""
    loader = PackageLoader("tl_contrastive_lrp.render", "templates")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)


def source(name: str) -> str:
    """The text of a file in ``templates`` that is not a template (script, style sheet)."""
    env = templates()
    assert env.loader is not None
    return env.loader.get_source(env, name)[0]


def component(
    name: str,
    *,
    legend: Sequence[LegendLine] = (),
    greyed: Sequence[int] = (),
    grey: str = GREY,
    draw: str | None = None,
    extra: Any = None,
    **props: Any,
) -> OfflineHTML:
    """A circuitsvis React component as HTML that displays without network.

    Args:
        name: A component of circuitsvis' bundle, such as ``"ColoredTokens"``.
        legend: Lines above the view, each of (swatch colour or ``""``, words).
        greyed: Positions of tokens to draw grey whatever their value.
        grey: The colour of greyed tokens.
        draw: JavaScript for a function ``(element id, props, extra)`` that draws the view instead
            of the plain component; part of this package, never user text.
        extra: Data for ``draw``.
        **props: The component's properties (lists, numbers, strings, arrays, tensors); ``None``
            leaves one out. circuitsvis puts token text into ``innerHTML`` unescaped: pass tokens
            through :func:`tl_contrastive_lrp.render.text.inert` first.

    Raises:
        ValueError: A number is NaN or infinite.
    """
    uid = f"circuits-vis-{uuid4().hex[:13]}"
    body = (
        templates()
        .get_template("view.html")
        .render(uid=uid, legend=legend, greyed=[int(i) for i in greyed], grey=grey)
    )
    given = {key: convert_prop_type(value) for key, value in props.items() if value is not None}
    arguments = f"{script_json(uid)},{script_json(given)}"
    if draw is None:
        if not name.isidentifier():
            raise ValueError(f"{name!r} is not the name of a circuitsvis component")
        draw = f"(uid,props)=>CircuitsVis.render(uid,CircuitsVis.{name},props)"
    else:
        arguments += f",{script_json(extra)}"
    return OfflineHTML(body, inline_script(f"({draw.strip()})({arguments});"))


def page(views: Sequence[OfflineHTML], title: str) -> str:
    """One HTML page of several views, with the circuitsvis bundle once if any view needs it.

    Its content security policy lets a browser run exactly these scripts and request nothing.
    """
    drawn = any(not isinstance(view, PlainHTML) for view in views)
    scripts = [*([bundle()] if drawn else []), *(view.script for view in views)]
    return (
        templates()
        .get_template("page.html")
        .render(
            title=title,
            views=[Markup(view.body) for view in views],
            scripts=[Markup(script) for script in scripts],
            hashes=Markup(" ".join(script_hash(script) for script in scripts)),
        )
    )


def script_hash(text: str) -> str:
    """The content security policy source that allows one inline script."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
