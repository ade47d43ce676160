"""Curves of removed tokens as a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from _faithfulness_runs import GRID

Curves = Mapping[tuple[str, str], np.ndarray]
SAID = {
    "integrated_gradients": "integrated gradients",
    "recency": "recency (later first)",
}


def picture(curves: Curves, title: str) -> str:
    """MoRF (solid) and LeRF (dashed) of some methods as SVG."""
    width, height, left, top = 620, 340, 60, 40
    shown = [m for m in ("attnlrp", "gim", "gradient", "integrated_gradients", "random")
             if (m, "MoRF") in curves]  # fmt: skip
    colours = ("#3366aa", "#cc6677", "#117733", "#997700", "#777777")
    all_y = np.concatenate([curves[m, o] for m in shown for o in ("MoRF", "LeRF")])
    low, high = float(min(all_y.min(), -1.0)), float(max(all_y.max(), 0.0))
    x: Callable[[float], float] = lambda share: left + share * (width - left - 190)  # noqa: E731
    y: Callable[[float], float] = lambda value: (  # noqa: E731
        top + (high - value) / (high - low) * (height - top - 50)
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="12" role="img" aria-label="{title}">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="20">{title}</text>',
        f'<text x="{left}" y="{height - 10}">share of tokens removed</text>',
    ]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(
            f'<text x="{x(share):.1f}" y="{height - 30}" text-anchor="middle">{share:g}</text>'
        )
    for value in np.arange(np.ceil(low * 2) / 2, high + 1e-9, 0.5):
        parts.append(f'<line x1="{left}" x2="{x(1):.1f}" y1="{y(value):.1f}" y2="{y(value):.1f}" '
                     'stroke="#dddddd"/>')  # fmt: skip
        parts.append(
            f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>'
        )
    for number, (method, colour) in enumerate(zip(shown, colours, strict=False)):
        for order, dash in (("MoRF", ""), ("LeRF", ' stroke-dasharray="5 4"')):
            points = " ".join(
                f"{x(a):.1f},{y(b):.1f}" for a, b in zip(GRID, curves[method, order], strict=True)
            )
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" '
                         f'stroke-width="2"{dash}/>')  # fmt: skip
        parts.append(f'<text x="{x(1) + 12:.1f}" y="{top + 18 * number + 10}" fill="{colour}">'
                     f"{SAID.get(method, method)}</text>")  # fmt: skip
    note = top + 18 * len(shown) + 20
    parts.append(f'<text x="{x(1) + 12:.1f}" y="{note}">solid: MoRF</text>')
    parts.append(f'<text x="{x(1) + 12:.1f}" y="{note + 16}">dashed: LeRF</text></svg>')
    return "\n".join(parts) + "\n"
