"""Turns results of patching functions into the effects of named cells, for ``compare``."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.patching import PatchingResult
from transformer_lens.tools.analysis.attribution_patching import AttributionResult, Node

from ...errors import a_kind

Cell = tuple[int | str, ...]
# Values whose relative difference is smaller than this are equal up to float32's rounding.
_ROUNDING = 8 * torch.finfo(torch.float32).eps


@dataclass(frozen=True, eq=False)
class Effects:
    """Measured and estimated effects of the same cells.

    Attributes:
        measured: Measured effects in float64; those within ``floor`` of 0 are set to 0. The example
            axis is 1 where there is a single effect per cell.
        estimated: Estimated effects, likewise.
        axes: Names of the axes that locate a cell; see ``Comparison``.
        cells: The location of each cell.
        floor: Effects up to this size are rounding of the values that they were computed from.
    """

    measured: Float[Tensor, "cell example"]
    estimated: Float[Tensor, "cell example"]
    axes: tuple[str, ...]
    cells: tuple[Cell, ...]
    floor: float

    @property
    def _layers(self) -> list[str]:
        axis = self.axes.index("layer")
        return [str(cell[axis]) for cell in self.cells]

    @property
    def layer_names(self) -> tuple[str, ...]:
        """The layers, in the order of the cells."""
        return tuple(dict.fromkeys(self._layers))

    def rows(self, layer: str | None) -> Bool[Tensor, " cell"]:
        """Mark the cells of a layer, or all cells if ``layer`` is None."""
        return torch.tensor([layer is None or name == layer for name in self._layers])

    def rounded(self, effects: Tensor) -> Tensor:
        """Set effects that are no larger than rounding to 0."""
        return torch.where(effects.abs() <= self.floor, 0.0, effects)


def read_effects(
    patching: Any, relevance: Any, baseline: float | Tensor | None, axes: Sequence[str] | None
) -> Effects:
    """Read effects from either kind of result; ``compare`` lists arguments and errors."""
    patching, relevance = _node_scores(patching), _node_scores(relevance)
    if isinstance(patching, Mapping) and isinstance(relevance, Mapping):
        if baseline is not None or axes is not None:
            raise ValueError(
                "Scores of nodes or edges are effects already; leave baseline and axes out."
            )
        return _from_scores(patching, relevance)
    if isinstance(patching, Tensor) and isinstance(relevance, Tensor):
        if baseline is None:
            raise ValueError(
                "These tensors hold values of the objective, of which only the change by a patch "
                "can agree or not: give baseline=objective(model(corrupted_tokens)), the objective "
                "on the corrupted run, or baseline=0.0 if they hold changes already."
            )
        return _from_tensors(patching, relevance, baseline, axes)
    if isinstance(patching, PatchingResult) and isinstance(relevance, PatchingResult):
        if axes is not None:
            raise ValueError("A PatchingResult names its axes itself; leave axes out.")
        return _from_results(patching, relevance, baseline)
    raise TypeError(
        f"Cannot compare {a_kind(patching)} with {a_kind(relevance)}. Give two "
        "tensors or PatchingResults of one sweep (get_act_patch_x, get_relevance_patch_x), or two "
        "AttributionResults or mappings of nodes or edges to effects."
    )


def _node_scores(result: Any) -> Any:
    return result.node_scores if isinstance(result, AttributionResult) else result


def _finite(name: str, values: Tensor) -> Tensor:
    values = values.detach().cpu().double()
    if not values.isfinite().all():
        raise ValueError(f"The {name} result holds values that are not finite.")
    return values


def _effects(
    x: Float[Tensor, "cell example"],
    y: Float[Tensor, "cell example"],
    base: tuple[Tensor, Tensor],
    axes: tuple[str, ...],
    cells: list[Cell],
) -> Effects:
    x, y = _finite("patching", x), _finite("relevance", y)
    used = ((x != 0) | (y != 0)).any(1)  # exactly 0 on both sides is padding, not a value
    base_x, base_y = (_finite("baseline", b) for b in base)
    if not (base_x.any() or base_y.any()):
        used = torch.ones_like(used)
    largest = max(float(values.abs().max()) for values in (x, y, base_x, base_y))
    effects = Effects(x - base_x, y - base_y, axes, tuple(cells), largest * _ROUNDING)
    return Effects(
        effects.rounded(effects.measured[used]),
        effects.rounded(effects.estimated[used]),
        axes,
        tuple(itertools.compress(cells, used.tolist())),
        effects.floor,
    )


def _from_tensors(
    x: Tensor, y: Tensor, baseline: float | Tensor, axes: Sequence[str] | None
) -> Effects:
    if x.shape != y.shape:
        raise ValueError(
            f"The patching result has shape {list(x.shape)}, the relevance result {list(y.shape)}; "
            "compare the same sweep of the same prompt."
        )
    default = ("layer", *(f"axis_{i}" for i in range(1, x.ndim)))
    names = default if axes is None else tuple(axes)
    if len(names) != x.ndim or "layer" not in names or len(set(names)) != len(names):
        raise ValueError(
            f"axes={list(names)} must name the {x.ndim} axes of a tensor of shape "
            f"{list(x.shape)}, each once, one of them 'layer'."
        )
    cells: list[Cell] = list(itertools.product(*map(range, x.shape)))
    base = torch.as_tensor(baseline).detach().cpu().double()
    if base.numel() != 1:
        raise ValueError(f"baseline must be one number; it has shape {list(base.shape)}.")
    x, y = (rearrange(values.detach(), "... -> (...) 1") for values in (x, y))
    return _effects(x, y, (base, base), names, cells)


def _from_results(x: PatchingResult, y: PatchingResult, baseline: float | Tensor | None) -> Effects:
    for name, result in (("patching", x), ("relevance", y)):
        if result.has_metric_axis:
            raise ValueError(
                f"The {name} result holds several metrics; choose one: "
                f"result[{result.metric_names[0]!r}]."
            )
    if x.values.shape != y.values.shape or not x.index_df.equals(y.index_df):
        raise ValueError(
            f"The results are of different cells: values {list(x.values.shape)} and "
            f"{list(y.values.shape)} over {list(x.index_df.columns)} and "
            f"{list(y.index_df.columns)}. Compare the same sweep of the same prompts."
        )
    bases = []
    for result in (x, y):
        own = result.baseline if result.baseline is not None else baseline
        own = own if own is not None else (y if result is x else x).baseline
        if own is None:
            raise ValueError(
                "These results hold values of the objective, of which only the change by a patch "
                "can agree or not: make one of them with baseline=True, or give baseline=."
            )
        bases.append(torch.as_tensor(own).detach().cpu().double().reshape(-1))
    n = len(x.index_df)
    axes = tuple(str(column) for column in x.index_df.columns)
    if "layer" not in axes:
        raise ValueError(f"The results' axes {list(axes)} lack 'layer'.")
    cells = [tuple(row) for row in x.index_df.to_numpy().tolist()]
    return _effects(
        x.values.reshape(n, -1), y.values.reshape(n, -1), (bases[0], bases[1]), axes, cells
    )


def _from_scores(x: Mapping[Any, float], y: Mapping[Any, float]) -> Effects:
    if x.keys() != y.keys():
        unmatched = list(x.keys() ^ y.keys())
        raise ValueError(
            f"The results score different nodes or edges: {len(unmatched)} are in one of them "
            f"only, such as {unmatched[0]}. Compare the same model and prompt."
        )
    keys = list(x)
    of_edges = bool(keys) and isinstance(keys[0], tuple)
    cells = [_edge_cell(*key) if of_edges else _node_cell(key) for key in keys]
    axes = ("layer", "reader", "writer", "pos") if of_edges else ("layer", "node", "pos")
    values = [torch.tensor([float(m[key]) for key in keys])[:, None].double() for m in (x, y)]
    zero = torch.zeros(1, dtype=torch.float64)
    return _effects(values[0], values[1], (zero, zero), axes, cells)


def _name(node: Node) -> str:
    numbers = [str(number) for number in (node.layer, node.head) if number is not None]
    return ".".join([*numbers[:1], node.kind, *numbers[1:]])


def _node_cell(node: Node) -> Cell:
    return ("embed" if node.layer is None else node.layer, _name(node), node.position)


def _edge_cell(writer: Node, reader: Node) -> Cell:
    layer = "embed" if reader.layer is None else reader.layer
    return (layer, _name(reader), _name(writer), writer.position)
