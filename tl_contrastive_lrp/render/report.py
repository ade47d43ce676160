"""One attribution as one HTML page that opens from disk and requests nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from . import tables
from .folds import LONG, folds_of
from .graph.picture import GraphView, graph_section, section_script
from .offline import script_hash, source, templates
from .prompt import account, parts, rankings, token_rows
from .scale import GREY, NEGATIVE, POSITIVE, as_array, as_mask, check_tokens, span
from .text import (
    PARTS,
    inline_script,
    packed,
    packed_half,
    part_marks,
    percent,
    script_json,
    signed,
    visible,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Report:
    """The data of a page. Arrays may be numpy arrays, tensors or nested lists.

    Attributes:
        title: Heading of the page.
        model_name: Name of the model, as the user gave it.
        rules: Name of the rule set.
        objective: The objective in words, with its sign convention.
        str_tokens: The prompt's tokens as text, ``[pos]``.
        token_ids: Their ids, ``[pos]``.
        tokens: Relevance in logits, ``[pos]``; positive supports the target.
        delta: Δℓ, the objective's value in logits.
        target: The token that the model preferred; several for a set, none for other objectives.
        contrast: The token that it should have preferred; likewise.
        target_logit: The target's logit (a set's mean), or ``None``.
        contrast_logit: The contrast's logit, or ``None``.
        quantity: What these two are, in words.
        target_is_top: Whether the target is the token that greedy decoding writes, in which case
            the page says "the model wrote", else "why this rather than that".
        greyed: One bool per token, ``[pos]``: special tokens and the first token.
        position: The position whose prediction is explained, or several in words ("3, 5-8");
            ``None`` for the last.
        resid: Relevance in logits, ``[site, pos]``, or ``None``.
        site_labels: One HookPoint name per site.
        heads: Relevance in logits, ``[layer, head, pos]``, or ``None``.
        candidates: Rows of the next-token table, or ``None``. Keys become column names; a column
            ``token`` is shown as a token, ``probability`` as a percentage.
        ledger: One row per site: ``site``, ``total``, ``share`` (of Δℓ), ``biases``, ``position``,
            ``other``.
        coverage: Rows that say which component has which rule.
        graph: The attribution graph, pruned, or ``None``.
        notes: Sentences for the end of the page.
        messages: Rows for the messages of a chat, shown above its tokens: ``share`` (of Δℓ) with a
            bar, ``token`` as a token; none for other prompts.
        message_starts: Position of the first token of each of them, and its name: a long prompt is
            folded within messages.
        verdict: Paragraphs that say whether the map held when its tokens were replaced; none if
            that was not tried.
        measured: With a verdict, the measured effect of each token in logits, ``[pos]``, ``None``
            where it was not replaced; or ``None`` for no such column.
        measured_segments: With a verdict on segments, a row for each.
    """

    title: str
    model_name: str
    rules: str
    objective: str
    str_tokens: Sequence[str]
    token_ids: Sequence[int]
    tokens: Any
    delta: float
    target: Sequence[str] = ()
    contrast: Sequence[str] = ()
    target_logit: float | None = None
    contrast_logit: float | None = None
    quantity: str = "logit"
    target_is_top: bool = True
    greyed: Any = None
    position: int | str | None = None
    resid: Any = None
    site_labels: Sequence[str] = ()
    heads: Any = None
    candidates: Rows | None = None
    ledger: Rows = ()
    coverage: Rows = ()
    graph: GraphView | None = None
    notes: Sequence[str] = field(default=())
    messages: Rows = ()
    message_starts: Sequence[tuple[int, str]] = ()
    verdict: Sequence[str] = ()
    measured: Sequence[float | None] | None = None
    measured_segments: Rows = ()


def report_html(report: Report) -> str:
    """The page for a report: one self-contained string of HTML.

    The prompt's colours are linear in relevance; full colour is the largest magnitude among the
    tokens that are not greyed, or among all when the reader ticks the box.

    A prompt of more than ``folds.LONG`` tokens is folded: runs of tokens of low relevance are
    closed pieces (``<details>``, which open by click, by keyboard, by the browser's own search and
    without JavaScript) that state how many tokens they hold, what their relevance sums to and how
    large the largest is. A closed piece is one text; its tokens become elements when it is opened,
    and so do the rows of the table of all tokens. A search box finds text across tokens, also in
    closed pieces, and opens them; rankings lead to their tokens. Hidden states are sent as float16
    times one unit per site, which keeps three digits.

    All text is escaped, and the page's content security policy forbids every request and every
    script but its own.

    Raises:
        ValueError: Shapes and lengths disagree, or a value is NaN or infinite.
        TypeError: ``str_tokens`` is not a list of strings.
    """
    relevance = as_array(report.tokens, 1, "tokens")
    words = check_tokens(report.str_tokens, relevance.shape[0])
    ids = [int(i) for i in report.token_ids]
    if len(ids) != len(words):
        raise ValueError(f"{len(ids)} token ids for {len(words)} tokens")
    delta = float(as_array(report.delta, 0, "delta"))
    greyed = as_mask(report.greyed, len(words))
    resid = _resid(report, len(words))
    measured = _measured(report, len(words))
    rows = token_rows(words, ids, relevance, greyed, delta, measured)
    long = len(words) > LONG
    folds = folds_of(relevance, greyed, words, report.message_starts)
    scripts = [_script(long)]
    if report.graph is not None:
        if list(report.graph.str_tokens) != words:
            raise ValueError("graph is of another prompt than the report: its tokens differ")
        scripts.append(section_script())
    total = float(relevance.sum())
    spans = [float(span(relevance, mask)) for mask in (greyed, greyed & False)]
    data = {
        "sites": [str(label) for label in report.site_labels] if resid is not None else [],
        "resid": packed(resid) if resid is not None and not long else "",
        "relevance": [float(f"{value:.6g}") for value in relevance],
        "scales": spans,
        "greyed": greyed.astype(int).tolist(),
        "tokens": [row["show"] for row in rows],
        "positive": POSITIVE,
        "negative": NEGATIVE,
        "grey": GREY,
    }
    if long and measured is not None:
        data["measured"] = measured
    if long:
        data |= {"ids": ids, "delta": delta, "folds": [[f.first, f.last] for f in folds]}
        if resid is not None:
            data["resid"], data["units"] = packed_half(resid)
    return (
        templates()
        .get_template("report.html")
        .render(
            report=report,
            target=_quoted(report.target),
            contrast=_quoted(report.contrast),
            delta=signed(delta),
            quantity=report.quantity,
            target_logit=_optional(report.target_logit),
            contrast_logit=_optional(report.contrast_logit),
            total=signed(total),
            total_share=percent(total / delta if delta else None),
            scales=[signed(scale)[1:] for scale in spans],
            greyed_count=int(greyed.sum()),
            rows=rows,
            parts_note=PARTS if any(part_marks(words)) else "",
            long=long,
            folds=folds,
            parts=parts(rows, folds),
            words=account(folds, relevance),
            rankings=[
                {"greyed": every, "sides": rankings(rows, relevance, eligible, in_context=long)}
                for every, eligible in ((False, ~greyed), (True, greyed | True))
            ],
            gradient=",".join([*reversed(NEGATIVE), *POSITIVE[1:]]),
            grey=GREY,
            heads=tables.heads(report.heads, words),
            ledger=tables.general(report.ledger),
            messages=tables.general(report.messages),
            has_measured=measured is not None,
            measured_segments=tables.general(report.measured_segments),
            candidates=tables.general(report.candidates or ()),
            coverage=tables.general(report.coverage),
            data=Markup(script_json(data)),
            style=Markup(source("report.css") + (source("folded.css") if long else "")),
            graph=None if report.graph is None else graph_section(report.graph),
            scripts=[Markup(script) for script in scripts],
            hashes=Markup(" ".join(script_hash(script) for script in scripts)),
        )
    )


def _resid(report: Report, length: int) -> NDArray[np.float64] | None:
    if report.resid is None:
        return None
    resid = as_array(report.resid, 2, "resid")
    if resid.shape != (len(report.site_labels), length):
        raise ValueError(
            f"resid has shape {resid.shape}, but there are {len(report.site_labels)} site labels "
            f"and {length} tokens"
        )
    return resid


def _measured(report: Report, length: int) -> list[float | None] | None:
    """The measured effects, checked.

    Raises:
        ValueError: There is not one for each token, or one is NaN or infinite.
    """
    if report.measured is None:
        return None
    measured = [None if value is None else float(value) for value in report.measured]
    if len(measured) != length:
        raise ValueError(f"{len(measured)} measured effects for {length} tokens")
    as_array([value for value in measured if value is not None], 1, "measured")
    return measured


def _script(long: bool) -> str:
    """The page's script; only the page of a long prompt has what a long prompt needs."""
    files = {"look": "look.js"}
    if long:
        files |= {"folded": "folded.js", "find": "find.js", "table": "tokens_table.js"}
    parts = ",\n".join(f"{name}: {source(file).strip()}" for name, file in files.items())
    return inline_script(f"({source('report.js').strip()})({{{parts}}});")


def _quoted(tokens: Sequence[str]) -> str:
    """Tokens in words: «First», or «a», «b» for a set."""
    several = [tokens] if isinstance(tokens, str) else tokens
    return ", ".join(f"\u00ab{visible(token)}\u00bb" for token in several)


def _optional(value: float | None) -> str:
    return "" if value is None else signed(float(value))
