"""A comparison as a plotly figure, and plotly figures that display without network.

The module plotly is imported only when a figure is made.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import save_html

if TYPE_CHECKING:
    import pandas as pd

_COLUMNS = ("pos", "src_pos", "dest_pos")


def _plotly(module: str) -> Any:
    """A module of plotly, which is an optional dependency."""
    try:
        return import_module(f"plotly.{module}")
    except ImportError as error:
        raise ImportError(
            "Plots need plotly: pip install plotly. The same figures are in .to_frame() and "
            ".to_cells()."
        ) from error


def _pivot(cells: pd.DataFrame, axes: tuple[str, ...]) -> tuple[list[str], pd.DataFrame, str]:
    """The row label of each cell, the cells, and the axis that runs to the right."""
    right = next((axis for axis in _COLUMNS if axis in axes), axes[-1])
    down = [axis for axis in axes if axis != right] or [right]
    named = "node" in axes or "reader" in axes  # their names include the layer
    parts = [axis for axis in down if not (named and axis == "layer")]
    if named:
        labels = [" ← ".join(map(str, row)) for row in cells[parts].itertuples(index=False)]
    else:
        labels = [
            ", ".join(f"{axis} {value}" for axis, value in zip(parts, row, strict=True))
            for row in cells[parts].itertuples(index=False)
        ]
    return labels, cells, right


def agreement_figure(cells: pd.DataFrame, axes: tuple[str, ...], title: str) -> Any:
    """Scatter of estimated over measured effects, and both as heatmaps on one colour scale.

    Args:
        cells: One cell per row: its axes, "measured" and "estimated".
        axes: The columns that identify a cell, "layer" among them.
        title: The heading.

    Raises:
        ImportError: Plotly is not installed.
    """
    go, make = _plotly("graph_objects"), _plotly("subplots").make_subplots
    labels, cells, right = _pivot(cells, axes)
    figure = make(
        rows=1,
        cols=3,
        column_widths=[0.4, 0.3, 0.3],
        subplot_titles=("each cell", "measured by patching", "estimated"),
        horizontal_spacing=0.12,
    )
    names = [f"{label}, {right} {at}" for label, at in zip(labels, cells[right], strict=True)]
    values = cells[["measured", "estimated"]].to_numpy()
    ends = [float(values.min()), float(values.max())]
    line = {"color": "#999", "dash": "dot"}
    figure.add_scatter(x=ends, y=ends, mode="lines", line=line, name="equal", row=1, col=1)
    layers = cells["layer"].astype(str)
    for layer in dict.fromkeys(layers):
        here = (layers == layer).to_numpy()
        figure.add_scatter(
            x=values[here, 0].tolist(),
            y=values[here, 1].tolist(),
            mode="markers",
            name=f"layer {layer}" if layer.isdigit() else layer,
            text=[name for name, is_here in zip(names, here, strict=True) if is_here],
            hovertemplate="%{text}<br>measured %{x:.4g}<br>estimated %{y:.4g}<extra></extra>",
            row=1,
            col=1,
        )
    figure.update_xaxes(title_text="measured effect", row=1, col=1)
    figure.update_yaxes(title_text="estimated effect", row=1, col=1)
    grid = cells.assign(row=labels)
    rows = list(dict.fromkeys(labels))
    for column, side in ((2, "measured"), (3, "estimated")):
        table = grid.pivot(index="row", columns=right, values=side).loc[rows]
        figure.add_trace(
            go.Heatmap(
                z=table.to_numpy(dtype=float, na_value=float("nan")).tolist(),
                x=[str(name) for name in table.columns],
                y=rows,
                coloraxis="coloraxis",
                hovertemplate=f"%{{y}}<br>{right} %{{x}}<br>%{{z:.4g}}<extra></extra>",
            ),
            row=1,
            col=column,
        )
        figure.update_xaxes(title_text=right, type="category", row=1, col=column)
        figure.update_yaxes(autorange="reversed", type="category", row=1, col=column)
    figure.update_yaxes(showticklabels=False, row=1, col=3)
    figure.update_layout(
        title_text=title,
        template="simple_white",
        coloraxis={"colorscale": "RdBu", "cmid": 0.0},
        legend={"orientation": "h", "y": -0.2},
        height=480,
    )
    return figure


class OfflineFigure:
    """A plotly figure whose HTML holds plotly's JavaScript and uses no network.

    Attributes:
        figure: The plotly ``Figure``.
    """

    def __init__(self, figure: Any) -> None:
        self.figure = figure

    def _html(self, full: bool) -> str:
        html: str = _plotly("io").to_html(
            self.figure,
            include_plotlyjs=True,
            full_html=full,
            config={"displaylogo": False, "responsive": True},
        )
        return html

    def _repr_html_(self) -> str:
        return self._html(False)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the figure as one HTML page; errors are those of ``files.save_html``."""
        return save_html(path, self._html(True))


Line = tuple[str, Sequence[float], Sequence[float]]


def line_figure(
    lines: Sequence[Line], *, x: str, y: str, log_x: bool = False, pairs: bool = False
) -> Any:
    """A plotly ``Figure`` of lines.

    Args:
        lines: The name, x and y of each line.
        x: Title of the x axis.
        y: Title of the y axis.
        log_x: Whether the x axis is logarithmic.
        pairs: Whether lines come in pairs of one colour, the second dashed.

    Raises:
        ImportError: Plotly is not installed; says how to install it.
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
