"""Transitions of a graph, or heads of one transition, as circuitsvis' attention heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from einops import reduce

from ..offline import OfflineHTML, component, source
from ..ranking import largest_mask
from ..scale import LIGHT_NEGATIVE, LIGHT_POSITIVE, as_array, as_mask, check_tokens, largest_among
from ..text import printable, rounded, signed, visible, with_parts

if TYPE_CHECKING:
    from numpy.typing import NDArray

# circuitsvis draws every cell as an object of its own; with more cells a browser becomes slow.
MAX_CELLS = 40_000


def attention_matrices(
    str_tokens: Sequence[str],
    matrices: Any,
    labels: Sequence[str],
    *,
    greyed: Any = None,
    scale: Literal["matrix", "shared"] = "matrix",
    target: str = "the target",
    contrast: str = "the contrast",
    positions: Sequence[int] | None = None,
    notes: Sequence[str] = (),
    max_cells: int = MAX_CELLS,
) -> OfflineHTML:
    """Edges as circuitsvis' ``attention_heads``: red supports the target, blue the contrast.

    Rows are targets (later site), columns sources. Scales are symmetric: full colour is the largest
    magnitude among entries between two different positions whose source is not greyed; the
    diagonal, where most relevance stays, is clipped to it. Tooltips show the true values. If no
    source comes after its target, the upper triangle is masked.

    Args:
        str_tokens: The tokens as text, ``[pos]``.
        matrices: Relevance that a target passes to a source, in logits,
            ``[matrix, target_pos, source_pos]``: one matrix per transition or per head.
        labels: One name per matrix.
        greyed: One bool per token, ``[pos]``: sources left out of the scale. ``None`` greys none.
        scale: ``"matrix"`` for a scale per matrix, or ``"shared"`` for one scale, on which early
            transitions look blank: near the input, relevance is spread over many positions.
        target: Words for what positive relevance supports, for the legend.
        contrast: Words for what negative relevance supports.
        positions: The tokens' true positions, if they are only some of the prompt's.
        notes: More lines above the view.
        max_cells: If all matrices together have more cells, only the positions that exchange most
            relevance are shown, and the legend says so.

    Raises:
        ValueError: Shapes and lengths disagree, nothing to show, NaN or infinite values, an
            unknown ``scale``, or more matrices than ``max_cells`` can show.
        TypeError: ``str_tokens`` is not a list of strings.
    """
    array = as_array(matrices, 3, "matrices")
    count, length = len(array), array.shape[1]
    if array.shape[2] != length:
        raise ValueError(f"matrices must be square, got shape {array.shape}")
    tokens = [visible(token) for token in with_parts(check_tokens(str_tokens, length))]
    if len(labels) != count or not count:
        raise ValueError(f"{len(labels)} labels, but {count} matrices")
    if positions is not None and len(positions) != length:
        raise ValueError(f"{len(positions)} positions, but {length} tokens")
    if scale not in ("matrix", "shared"):
        raise ValueError(f"scale must be 'matrix' or 'shared', not {scale!r}")
    mask = as_mask(greyed, length)
    scales = [_scale(matrix, mask) for matrix in (array if scale == "matrix" else [array])]
    full = (
        f"\u00b1{signed(scales[0])[1:]} logits" if len(scales) == 1 else "each matrix's own largest"
    )
    words = ["Rows: targets. Columns: the sources they pass relevance to.", *map(printable, notes)]
    after = bool(np.triu(array, 1).any())
    shown_positions = np.arange(length)
    if length > room(count, max_cells):
        shown_positions = busiest(array, room(count, max_cells))
        shown = array[:, shown_positions[:, None], shown_positions]
        share = np.abs(shown).sum() / (np.abs(array).sum() or 1.0)
        words.append(
            f"The {len(shown_positions)} of {length} positions that exchange the most relevance; "
            f"their entries hold {100 * share:.1f} % of \u03a3|weight|."
        )
        array = shown
    if positions is not None or len(shown_positions) < length:
        # circuitsvis numbers the columns it is given, so the true position goes with the token.
        true = shown_positions if positions is None else np.asarray(positions)[shown_positions]
        tokens = [
            f"{pos}:{tokens[at]}"
            for pos, at in zip(true.tolist(), shown_positions.tolist(), strict=True)
        ]
    legend = [
        (LIGHT_POSITIVE, f"red, positive: supports {visible(target)}"),
        (LIGHT_NEGATIVE, f"blue, negative: supports {visible(contrast)}"),
        ("", f"full colour: {full} off the diagonal"),
    ]
    return component(
        "AttentionHeads",
        legend=[legend, *([("", line)] for line in words)],
        tokens=tokens,  # drawn on a canvas: there is no markup to break out of
        attention=rounded(array, 4),
        attentionHeadNames=[printable(str(label)) for label in labels],
        draw=source("graph_matrices.js"),
        extra={
            "scales": scales if scale == "matrix" else scales * count,
            "title": "Point at a matrix to show it, click to keep it.",
        },
        positiveColor=LIGHT_POSITIVE,
        negativeColor=LIGHT_NEGATIVE,
        maskUpperTri=not after,
    )


def _scale(array: NDArray[np.float64], greyed: NDArray[np.bool_]) -> float:
    """The size of full colour, for one matrix or for several together."""
    apart = ~np.eye(array.shape[-1], dtype=bool)
    size = reduce(np.abs(array), "... target source -> target source", "max")
    return largest_among(size, apart & ~greyed, apart)


def room(count: int, max_cells: int) -> int:
    """How many positions ``count`` matrices can show within ``max_cells``.

    Raises:
        ValueError: They cannot show even two.
    """
    positions = int((max_cells / count) ** 0.5)
    if positions < 2:
        raise ValueError(
            f"{count} matrices do not fit into {max_cells} cells; choose fewer of them, such as "
            "every fourth"
        )
    return positions


def busiest(array: NDArray[np.float64], limit: int) -> NDArray[np.int64]:
    """The positions that exchange the most relevance with others, in the prompt's order."""
    size = np.abs(array).sum(axis=0)
    np.fill_diagonal(size, 0.0)
    return np.flatnonzero(largest_mask(size.sum(axis=0) + size.sum(axis=1), limit))
