"""Tokens coloured by relevance, drawn by circuitsvis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .folds import LONG
from .long_tokens import long_tokens
from .offline import OfflineHTML, component, source
from .scale import GREY, LIGHT_NEGATIVE, LIGHT_POSITIVE, as_array, as_mask, check_tokens, span
from .text import PARTS, inert, part_marks, rounded, signed

if TYPE_CHECKING:
    from numpy.typing import NDArray


def colored_tokens(
    str_tokens: Sequence[str],
    values: Any,
    *,
    greyed: Any = None,
    target: str = "the target",
    contrast: str = "the contrast",
) -> OfflineHTML:
    """Tokens by relevance, as circuitsvis' ``colored_tokens``: red supports the target.

    Blue supports the contrast, zero is white and the scale is symmetric: full colour is the largest
    magnitude among the tokens that are not greyed. A prompt of more than ``folds.LONG`` tokens is
    folded and shown by :func:`long_tokens`, in the same colours.

    Args:
        str_tokens: The tokens as text, ``[pos]``; shown literally, whatever they contain.
        values: Relevance in logits, ``[pos]`` (list, array or tensor).
        greyed: One bool per token, ``[pos]``: drawn grey and left out of the scale (the tooltip
            still shows the value). Meant for special tokens and the first token, whose relevance
            would otherwise drown the rest. ``None`` greys nothing.
        target: Words for what positive relevance supports, for the legend.
        contrast: Words for what negative relevance supports.

    Returns:
        An object that a notebook displays; its HTML carries its script and requests nothing.

    Raises:
        ValueError: Lengths differ, there are no tokens, or a value is NaN or infinite.
        TypeError: ``str_tokens`` is not a list of strings.
    """
    array = as_array(values, 1, "values")
    tokens = check_tokens(str_tokens, array.shape[0])
    mask = as_mask(greyed, len(tokens))
    scale = float(span(array, mask))
    legend = [
        _legend(tokens, target, contrast, mask, f"full colour: \u00b1{signed(scale)[1:]} logits")
    ]
    if len(tokens) > LONG:
        return long_tokens(
            tokens,
            array[None],
            [""],
            np.array([scale]),
            mask,
            legend=legend,
            target=target,
            contrast=contrast,
        )
    return component(
        "ColoredTokens",
        legend=legend,
        greyed=np.flatnonzero(mask).tolist(),
        grey=GREY,
        tokens=_inert_tokens(tokens),
        values=rounded(array, 6),
        minValue=-scale,
        maxValue=scale,
        negativeColor=LIGHT_NEGATIVE,
        positiveColor=LIGHT_POSITIVE,
    )


def colored_tokens_by_site(
    str_tokens: Sequence[str],
    values: Any,
    labels: Sequence[str],
    *,
    greyed: Any = None,
    scale: Literal["site", "shared"] = "site",
    target: str = "the target",
    contrast: str = "the contrast",
) -> OfflineHTML:
    """Tokens by relevance at several sites, as circuitsvis' ``colored_tokens_multi``.

    The reader selects a site by pointing at its label. Relevance gathers at the last position
    towards the output, so one scale for all sites leaves the early ones blank. By default each site
    has its own scale: the largest magnitude among its tokens that are not greyed. The numbers in
    the tooltips are logits either way.
    A prompt of more than ``folds.LONG`` tokens is shown by :func:`long_tokens`, folded, with a
    list to choose the site from.

    Args:
        str_tokens: The tokens as text, ``[pos]``.
        values: Relevance in logits, ``[site, pos]``.
        labels: One name per site.
        greyed: One bool per token, as in :func:`colored_tokens`.
        scale: ``"site"``, or ``"shared"`` for one scale over all sites.
        target: Words for what positive relevance supports.
        contrast: Words for what negative relevance supports.

    Raises:
        ValueError: Shapes and lengths disagree, nothing to show, NaN or infinite values, or an
            unknown ``scale``.
        TypeError: ``str_tokens`` is not a list of strings.
    """
    array = as_array(values, 2, "values")
    tokens = check_tokens(str_tokens, array.shape[1])
    names = [str(label) for label in labels]
    if len(names) != array.shape[0] or not names:
        raise ValueError(f"{len(names)} labels, but values for {array.shape[0]} sites")
    if scale not in ("site", "shared"):
        raise ValueError(f"scale must be 'site' or 'shared', not {scale!r}")
    mask = as_mask(greyed, len(tokens))
    if scale == "site":
        scales = span(array, mask)
        words = "full colour: each site's own largest value"
    else:
        shared = float(span(np.abs(array).max(axis=0), mask))
        scales = np.full(len(names), shared)
        words = f"full colour: \u00b1{signed(shared)[1:]} logits"
    first = _legend(tokens, target, contrast, mask, words)
    if len(tokens) > LONG:
        return long_tokens(
            tokens, array, names, scales, mask, legend=[first], target=target, contrast=contrast
        )
    return component(
        "ColoredTokensMulti",
        legend=[
            first,
            [("", "Point at a site to show it, click to keep it. Bounds count in full colours.")],
        ],
        greyed=np.flatnonzero(mask).tolist(),
        grey=GREY,
        draw=source("sites.js"),
        extra={
            "scales": scales.tolist(),
            "positive": LIGHT_POSITIVE,
            "negative": LIGHT_NEGATIVE,
        },
        tokens=_inert_tokens(tokens),
        values=rounded(array.T, 6),
        labels=names,
        positiveBounds=[1.0] * len(names),
        negativeBounds=[-1.0] * len(names),
    )


def _inert_tokens(tokens: Sequence[str]) -> list[str]:
    return [
        (inert(token) if token or not mark else "") + mark
        for token, mark in zip(tokens, part_marks(tokens), strict=True)
    ]


def _legend(
    tokens: Sequence[str], target: str, contrast: str, mask: NDArray[np.bool_], full: str
) -> list[tuple[str, str]]:
    line = [
        (LIGHT_POSITIVE, f"red, positive: supports {target}"),
        (LIGHT_NEGATIVE, f"blue, negative: supports {contrast}"),
    ]
    if mask.any():
        line.append((GREY, "grey: special and first tokens, left out of the scale"))
    if any(part_marks(tokens)):
        line.append(("", PARTS))
    return [*line, ("", full)]
