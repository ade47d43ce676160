"""Curves as a plotly figure; plotly is asked for only when a figure is."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

Line = tuple[str, Sequence[float], Sequence[float]]


def line_figure(
    lines: Sequence[Line], *, x: str, y: str, log_x: bool = False, pairs: bool = False
) -> Any:
    """A plotly ``Figure`` of (name, x, y) lines.

    Args:
        lines: What to draw.
        x, y: Titles of the axes.
        log_x: Logarithmic x axis.
        pairs: Lines come in twos of one colour, the second dashed.

    Raises:
        ImportError: plotly is not installed; says how to install it.
    """
    try:
        go, colors = import_module("plotly.graph_objects"), import_module("plotly.colors")
    except ImportError as error:
        raise ImportError(
            "Plots need plotly: pip install plotly. Every curve is also a DataFrame: .to_frame()."
        ) from error
    colours = colors.qualitative.Safe
    figure = go.Figure()
    for number, (name, xs, ys) in enumerate(lines):
        look = {"color": colours[(number // 2 if pairs else number) % len(colours)]}
        if pairs and number % 2:
            look["dash"] = "dash"
        figure.add_scatter(x=list(xs), y=list(ys), name=name, mode="lines+markers", line=look)
    figure.update_layout(template="simple_white", xaxis_title=x, yaxis_title=y)
    if log_x:
        figure.update_xaxes(type="log")
    return figure
