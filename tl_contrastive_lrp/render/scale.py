"""Numbers to colours: one symmetric, colour-blind-safe scale with white at zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import NonFiniteError, a_kind

if TYPE_CHECKING:
    from numpy.typing import NDArray

# From white to full colour. Red and blue differ in hue for every common colour vision, and both
# become darker with magnitude, so the magnitude also survives in grey print.
POSITIVE = ("#ffffff", "#fbd9c6", "#f39d7c", "#d8513f", "#a81529")
NEGATIVE = ("#ffffff", "#d3e5f4", "#8fc1e6", "#3f86c5", "#1c4f96")
GREY = "#e4e4e7"

# circuitsvis switches to white text at a brightness where neither black nor white reads well; these
# full colours stay light enough for black text.
LIGHT_POSITIVE = "#f58a72"
LIGHT_NEGATIVE = "#74b3ea"


def as_array(values: Any, ndim: int, what: str) -> NDArray[np.float64]:
    """A finite float64 array of ``ndim`` dimensions from a tensor, an array or nested lists.

    Raises:
        ValueError: The number of dimensions differs.
        NonFiniteError: A value is NaN or infinite.
    """
    if hasattr(values, "detach"):
        values = values.detach().double().cpu().numpy()
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != ndim:
        raise ValueError(f"{what} must have {ndim} dimension(s), got shape {array.shape}")
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        raise NonFiniteError(
            f"{what} has {len(bad)} value(s) that are NaN or infinite, first at index "
            f"{tuple(int(i) for i in bad[0])}; there is no colour for them"
        )
    return array


def as_mask(greyed: Any, length: int) -> NDArray[np.bool_]:
    """One bool per token; ``None`` means that no token is greyed.

    Raises:
        ValueError: There is not exactly one flag per token, or a flag is not a bool (positions or
            ids given by mistake would otherwise count as flags).
    """
    if greyed is None:
        return np.zeros(length, dtype=bool)
    if hasattr(greyed, "detach"):
        greyed = greyed.detach().cpu().numpy()
    mask = np.asarray(greyed)
    if mask.shape != (length,) or mask.dtype != bool:
        raise ValueError(
            f"greyed must be one bool per token ({length}), got {mask.dtype} of shape {mask.shape}"
        )
    return mask


def check_tokens(str_tokens: Sequence[str], length: int) -> list[str]:
    """The tokens as a list, one for each of ``length`` positions.

    Raises:
        ValueError: There are no tokens, or not ``length`` of them.
        TypeError: They are one string, or an entry is not a string.
    """
    if isinstance(str_tokens, str):
        raise TypeError("str_tokens must be a list of strings, one per token, not one string")
    tokens = list(str_tokens)
    odd = [i for i, token in enumerate(tokens) if not isinstance(token, str)]
    if odd:
        raise TypeError(f"str_tokens[{odd[0]}] is {a_kind(tokens[odd[0]])}, not a string")
    if not tokens:
        raise ValueError("there are no tokens to show")
    if len(tokens) != length:
        raise ValueError(f"{len(tokens)} tokens, but values for {length} positions")
    return tokens


def span(values: NDArray[np.float64], greyed: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The largest magnitude among the tokens that are not greyed; 1 if that is 0.

    Args:
        values: Relevance, ``[..., pos]``.
        greyed: One bool per token, ``[pos]``.

    Returns:
        The magnitude of full colour, ``[...]``, always positive.
    """
    largest: NDArray[np.float64] = np.where(greyed, 0.0, np.abs(values)).max(axis=-1)
    return np.where(largest > 0, largest, 1.0)


def largest_among(size: NDArray[np.float64], *masks: NDArray[np.bool_]) -> float:
    """The largest value under the first mask that has one above 0, else among all values, else 1.

    Args:
        size: Values, none of them negative.
        masks: Which values count, of the same shape, by preference.
    """
    for mask in (*masks, np.ones(size.shape, dtype=bool)):
        largest = float(size[mask].max(initial=0.0))
        if largest > 0:
            return largest
    return 1.0


def colours(
    fractions: NDArray[np.float64],
    positive: Sequence[str] = POSITIVE,
    negative: Sequence[str] = NEGATIVE,
) -> tuple[list[str], list[bool]]:
    """Background colours for fractions of the scale, and whether white text reads better on them.

    Args:
        fractions: Fractions of full colour, ``[pos]``, clipped to -1 … 1.
        positive: Colour stops for positive fractions, from zero to full.
        negative: Colour stops for negative fractions, from zero to full.

    Returns:
        A colour ``#rrggbb`` for each fraction, and whether white has more contrast with it (WCAG 2)
        than black.
    """
    x = np.clip(fractions, -1.0, 1.0)
    up, down = (_mix(np.abs(x), stops) for stops in (positive, negative))
    rgb = np.where((x >= 0)[:, None], up, down).round().astype(int)
    linear = np.where(rgb <= 10, rgb / 255 / 12.92, ((rgb / 255 + 0.055) / 1.055) ** 2.4)
    luminance = linear @ np.array([0.2126, 0.7152, 0.0722])
    white_text = 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05
    return [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in rgb.tolist()], white_text.tolist()


def _mix(x: NDArray[np.float64], stops: Sequence[str]) -> NDArray[np.float64]:
    """Linear interpolation between equally spaced colour stops, from ``[n]`` to ``[n, rgb]``."""
    points = np.linspace(0.0, 1.0, len(stops))
    rgb = np.array([[int(stop[i : i + 2], 16) for i in (1, 3, 5)] for stop in stops], dtype=float)
    return np.stack([np.interp(x, points, rgb[:, c]) for c in range(3)], axis=-1)
