"""Effects of patching, read inside one backward pass: (clean − corrupted) ⊙ modified gradient.

A ``Sweep`` names an activation and the axes along which single cells of it are patched, as the
sweeps of ``transformer_lens.patching`` do. Nothing of the size of an activation outlives its layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.utilities import get_act_name

from ...engine.plain import run
from ...engine.reading import Reading
from ...rules.functions import at_least_float32
from ...rules.rule_sets import RuleSet

# Dimensions of an activation behind the batch, under TransformerLens' names for swept axes.
_VECTOR = ("pos", "d_model")
_HEADS = ("pos", "head", "d_head")
_LAYOUT: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("resid_pre", "resid_mid", "attn_out", "mlp_out"), _VECTOR),
    **dict.fromkeys(("q", "k", "v", "z"), _HEADS),
    "pattern": ("head_index", "dest_pos", "src_pos"),
}


@dataclass(frozen=True)
class Sweep:
    """One activation of every layer, patched cell by cell.

    Attributes:
        activation: TransformerLens' short name of it ("resid_pre", "z", "pattern", ...).
        axes: The axes whose cells are patched one at a time; along the others all at once.
    """

    activation: str
    axes: tuple[str, ...]

    def hook_name(self, layer: int) -> str:
        """The HookPoint, under the name that ``transformer_lens.patching`` looks up in a cache."""
        return str(get_act_name(self.activation, layer))

    def shape(self, model: Any, pos: int) -> tuple[int | None, ...]:
        """Shape of the activation behind the batch; None where a layer may have its own width."""
        sizes = {
            "d_model": int(model.cfg.d_model),
            "d_head": None,
            **dict.fromkeys(("head", "head_index"), heads_of(model, self.activation)),
            **dict.fromkeys(("pos", "dest_pos", "src_pos"), pos),
        }
        return tuple(sizes[axis] for axis in _LAYOUT[self.activation])

    def cells(self, product: Float[Tensor, "batch *dims"]) -> Float[Tensor, "batch *axes"]:
        """Sum an activation-shaped tensor within each cell."""
        over = [i for i, axis in enumerate(_LAYOUT[self.activation], 1) if axis not in self.axes]
        return product.sum(over) if over else product


def heads_of(model: Any, activation: str) -> int:
    """How many heads the activation has: key and value heads may be fewer than query heads."""
    key_value = getattr(model.cfg, "n_key_value_heads", None)
    return int(key_value if activation in ("k", "v") and key_value else model.cfg.n_heads)


def sweep_effects(
    model: Any,
    tokens: Int[Tensor, "batch pos"],
    clean_cache: Any,
    objective: Callable[[Tensor], Tensor],
    sweeps: Sequence[Sweep],
    rules: str | RuleSet,
) -> list[Float[Tensor, "layer *axes batch"]]:
    """First-order effect on the objective of patching each cell, for each example of the batch.

    One forward and one backward pass of the corrupted tokens for all sweeps together.

    Args:
        model: A ``TransformerBridge``.
        tokens: The corrupted run.
        clean_cache: Activations of the clean run, as checked by ``checks.check_cache``.
        objective: logits → scalar; where it sums over the batch, each example's effect is that on
            its own term.
        sweeps: What to patch; no activation twice.
        rules: Rule set of the backward pass.

    Raises:
        ValueError: an activation never came by in the forward, or off the graph.
    """
    kept: dict[tuple[str, int], Tensor] = {}
    layers = range(int(model.cfg.n_layers))

    def reading(sweep: Sweep, layer: int) -> Reading:
        name, key = sweep.hook_name(layer), (sweep.activation, layer)

        def sink(x: Tensor, g: Tensor) -> None:
            clean = at_least_float32(clean_cache[name].detach().to(x.device))
            kept[key] = sweep.cells((clean - at_least_float32(x)) * at_least_float32(g))

        def fired(x: Tensor) -> None:
            if clean_cache[name].shape[1:] != x.shape[1:]:
                raise ValueError(
                    f"clean_cache[{name!r}] has shape {list(clean_cache[name].shape)}, the "
                    f"corrupted run's activation {list(x.shape)}. Make the cache with this model."
                )
            kept[key] = sweep.cells(at_least_float32(x.new_zeros(())).expand(x.shape))

        # The whole stream, which TransformerLens patches in place there, not only the MLP's branch.
        stream = sweep.activation == "resid_mid"
        return Reading(name, sink, "tensor" if stream else "branch", fired)

    readings = [reading(sweep, layer) for sweep in sweeps for layer in layers]
    run(model, tokens, objective, rules, readings)
    for sweep in sweeps:
        for layer in layers:
            if (sweep.activation, layer) not in kept:
                raise ValueError(
                    f"There is no gradient at {sweep.hook_name(layer)!r}: it did not fire in this "
                    "model's forward, or a hook put a constant there."
                )
    return [torch.stack([kept[s.activation, i] for i in layers]).movedim(1, -1) for s in sweeps]
