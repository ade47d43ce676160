"""Effects of patching, read inside one backward pass: (clean − corrupted) ⊙ modified gradient.

A ``Sweep`` names an activation and the axes along which its single cells are patched, as the sweeps
of ``transformer_lens.patching`` do. No tensor of the size of an activation outlives its layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from einops import rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.utilities import get_act_name

from ...engine.plain import run
from ...engine.reading import Reading
from ...rules.functions import at_least_float32
from ...rules.rule_sets import RuleSet

# The axes of an activation after the batch axis, under TransformerLens' names for swept axes.
_VECTOR = ("pos", "d_model")
_HEADS = ("pos", "head", "d_head")
_AXES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("resid_pre", "resid_mid", "attn_out", "mlp_out"), _VECTOR),
    **dict.fromkeys(("q", "k", "v", "z"), _HEADS),
    "pattern": ("head_index", "dest_pos", "src_pos"),
}


@dataclass(frozen=True)
class Sweep:
    """One activation, patched cell by cell in every layer.

    Attributes:
        activation: TransformerLens' short name for it ("resid_pre", "z", "pattern", ...).
        axes: The axes whose cells are patched one at a time. A cell spans all other axes.
    """

    activation: str
    axes: tuple[str, ...]

    def hook_name(self, layer: int) -> str:
        """Return the HookPoint's name, as ``transformer_lens.patching`` looks it up in a cache."""
        return str(get_act_name(self.activation, layer))

    def shape(self, model: Any, pos: int) -> tuple[int | None, ...]:
        """Return the activation's shape after the batch axis.

        A size is None where layers may differ in it.
        """
        sizes = {
            "d_model": int(model.cfg.d_model),
            "d_head": None,
            **dict.fromkeys(("head", "head_index"), n_heads_of(model, self.activation)),
            **dict.fromkeys(("pos", "dest_pos", "src_pos"), pos),
        }
        return tuple(sizes[axis] for axis in _AXES[self.activation])

    def sum_cells(self, product: Float[Tensor, "batch *dims"]) -> Float[Tensor, "batch *axes"]:
        """Sum an activation-shaped tensor within each cell."""
        before, after = " ".join(_AXES[self.activation]), " ".join(self.axes)
        return reduce(product, f"batch {before} -> batch {after}", "sum")


def n_heads_of(model: Any, activation: str) -> int:
    """Return the activation's number of heads: keys and values may have fewer than queries."""
    n_key_value_heads = getattr(model.cfg, "n_key_value_heads", None)
    if activation in ("k", "v") and n_key_value_heads:
        return int(n_key_value_heads)
    return int(model.cfg.n_heads)


def sweep_effects(
    model: Any,
    tokens: Int[Tensor, "batch pos"],
    clean_cache: Any,
    objective: Callable[[Tensor], Tensor],
    sweeps: Sequence[Sweep],
    rules: str | RuleSet,
) -> list[Float[Tensor, "layer *axes batch"]]:
    """Estimate, to first order, how patching each cell changes the objective for each example.

    All sweeps share one forward and one backward pass of the corrupted tokens.

    Args:
        model: A ``TransformerBridge``.
        tokens: Token ids of the corrupted run.
        clean_cache: Activations of the clean run, already checked by ``checks.check_cache``.
        objective: Maps logits to a scalar. If it sums over the batch, each example's effect is the
            effect on its own term.
        sweeps: What to patch; no activation may appear twice.
        rules: Rule set of the backward pass.

    Returns:
        One tensor per sweep, in the objective's units.

    Raises:
        ValueError: The cache does not fit the corrupted run, or an activation is missing from the
            forward pass or from its autograd graph.
    """
    effects: dict[tuple[str, int], Tensor] = {}
    layers = range(int(model.cfg.n_layers))

    def reading(sweep: Sweep, layer: int) -> Reading:
        name, key = sweep.hook_name(layer), (sweep.activation, layer)

        def sink(x: Tensor, g: Tensor) -> None:
            clean = at_least_float32(clean_cache[name].detach().to(x.device))
            effects[key] = sweep.sum_cells((clean - at_least_float32(x)) * at_least_float32(g))

        def fired(x: Tensor) -> None:
            if clean_cache[name].shape[1:] != x.shape[1:]:
                raise ValueError(
                    f"clean_cache[{name!r}] has shape {list(clean_cache[name].shape)}, the "
                    f"corrupted run's activation {list(x.shape)}. Make the cache with this model."
                )
            effects[key] = sweep.sum_cells(at_least_float32(x.new_zeros(())).expand(x.shape))

        # At resid_mid, TransformerLens patches the whole stream in place, not the MLP's branch.
        whole_stream = sweep.activation == "resid_mid"
        return Reading(name, sink, "tensor" if whole_stream else "branch", fired)

    readings = [reading(sweep, layer) for sweep in sweeps for layer in layers]
    run(model, tokens, objective, rules, readings)
    for sweep in sweeps:
        for layer in layers:
            if (sweep.activation, layer) not in effects:
                raise ValueError(
                    f"There is no gradient at {sweep.hook_name(layer)!r}: it did not fire in this "
                    "model's forward, or a hook put a constant there."
                )
    return [
        rearrange([effects[s.activation, i] for i in layers], "layer batch ... -> layer ... batch")
        for s in sweeps
    ]
