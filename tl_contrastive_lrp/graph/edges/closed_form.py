"""Edges of the attribution graph in closed form, read inside one backward pass.

Tokens mix only in attention, so the relevance that target position j passes to source position
i ≠ j within a block went through attention's values or keys. With g_z, g_S the gradients that the
one backward pass brings to attention's output and scores, and per head h:

    value path   A[j, i] = α_v · P[j, i] · ⟨g_z[j], ṽ[i]⟩
    key path     A[j, i] = α_k · g_S[j, i] · S̃[j, i],      S̃ = scale · ⟨q[j], k̃[i]⟩

α is what the rules give the factor (½ for halved products). ṽ and k̃ are the derivatives of v and k
along the residual vector: v and k without what biases contributed. A position's own share needs no
formula, since Σ_j A[j, i] is the source's relevance R_s[i]: it is what remains,

    A[i, i] = R_s[i] − Σ_{j≠i} A[j, i]        (residual, queries, MLP, and attention to itself).

arXiv:2604.17761, Appendix A, computes the same matrices with batches of backward passes.

Where no bias reaches keys and values and norms and soft-caps are linearised, ṽ = v and S̃ = S, and
both paths are gradient × value at ``hook_pattern`` and ``hook_attn_scores``. Otherwise
``tangents.py`` gives ṽ and S̃, inside the backward too: nothing of size head × pos² outlives its
layer but what autograd itself keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...engine.reading import BlockCall, Reading, tap
from ...hooks.sites import Site, scores_are_biased
from ...inputs.bridge import bias_of, components, hook_points
from ...rules.functions import at_least_float32
from ...rules.precision import plain
from ...rules.rule_sets import RuleSet
from ...rules.threads import mine
from .tangents import block_tangents


@dataclass(eq=False)
class BlockEdges:
    """What one block's attention passes between positions, filled while the backward runs.

    Attributes:
        layer: Index of the block.
        by_head: Whether ``value`` and ``key`` are kept.
        again: Whether another backward of the same forward follows, so that what it saw is kept.
        total: Σ over heads and paths, diagonal (attention to itself) included.
        value, key: The paths by head, on the CPU.
    """

    layer: int
    by_head: bool
    again: bool = False
    total: Float[Tensor, "target source"] | None = None
    value: Float[Tensor, "head target source"] | None = None
    key: Float[Tensor, "head target source"] | None = None
    _kept: dict[str, Tensor] = field(default_factory=dict)

    def seen(self, name: str) -> Tensor:
        """What the forward had there; let go if no backward needs it again."""
        return self._kept[name] if self.again else self._kept.pop(name)

    def clear(self) -> None:
        """Forget what the last backward brought."""
        self.total = self.value = self.key = None

    def add(self, path: str, a: Tensor, b: Tensor, share: float = 1.0) -> None:
        """Add one path's edges, ``share`` · a ⊙ b, both [head, target, source]."""
        a, b = at_least_float32(a), at_least_float32(b)
        if self.by_head:
            setattr(self, path, _product(a, b, share).cpu())
        total = a.new_zeros(a.shape[1:]) if self.total is None else self.total.clone()
        for head in range(len(a)):  # in place: no temporary of all heads
            total.addcmul_(a[head], b[head], value=share)
        if not bool(torch.isfinite(total.sum())):
            total = _product(a, b, share).sum(0) + (0.0 if self.total is None else self.total)
        self.total = total


def _product(a: Tensor, b: Tensor, share: float) -> Tensor:
    """share · a ⊙ b, 0 where b is 0: a hidden score of -inf takes no part."""
    return (share * a * b).masked_fill(b == 0, 0.0)


def biased_blocks(model: Any) -> frozenset[int]:
    """Blocks in which a bias reaches queries, keys or values: a norm's before them or their own."""
    return frozenset(
        int(path.split(".")[1])
        for path, component in components(model).items()
        if path.startswith("blocks.") and ".mlp" not in path and not path.endswith(".o")
        if bias_of(component.original_component) is not None
    )


def needs_tangents(
    layer: int, sites: tuple[Site, ...], rule_set: RuleSet, biased: frozenset[int]
) -> bool:
    """Whether v and S differ from their derivatives along the residual vector in this block."""
    prefix = f"blocks.{layer}."
    inside = [site for site in sites if site.path.startswith(prefix)]
    if any(site.operation == "softcap" for site in inside) and rule_set.softcap == "gradient":
        return True
    for site in inside:
        if site.operation == "attention" or (
            site.operation == "qk" and scores_are_biased(site.component)
        ):
            return True
    return rule_set.norm == "gradient" or layer in biased


@dataclass(eq=False)
class HookedBlock:
    """A block on which the user has hooks.

    Attributes:
        layer: Index of the block.
        edited: Whether one of them did more than look, once the forward has run.
        quiet: Whether gradients are to be ignored now.
        at_z: Called with (pattern·v, its gradient), [1, pos, head, d_head], in the backward: as
            attention made it, before any hook.
    """

    layer: int
    edited: Callable[[], bool]
    quiet: Callable[[], bool]
    at_z: Callable[[Tensor, Tensor], None] | None = None

    @contextmanager
    def before_hooks(self, model: Any) -> Iterator[None]:
        """Reads there while the model runs inside."""

        def pre_hook(point: Any, args: tuple[Any, ...]) -> Any:
            z, at_z = args[0], self.at_z
            if at_z is None or not getattr(z, "requires_grad", False):
                return None
            convert = getattr(point.hook_conversion, "convert", lambda x: x)

            def read(x: Tensor, g: Tensor) -> None:
                if not self.quiet():
                    at_z(convert(x), convert(plain(g)))

            return (tap(z, read), *args[1:])

        point = hook_points(model)[f"blocks.{self.layer}.attn.o.hook_in"]
        handle = point.register_forward_pre_hook(mine(pre_hook))
        try:
            yield
        finally:
            handle.remove()


def edge_readings(
    model: Any,
    edges: BlockEdges,
    sites: tuple[Site, ...],
    rule_set: RuleSet,
    call: BlockCall,
    biased: frozenset[int],
    seen: Callable[[], Tensor] | None = None,
    moved: Callable[[], tuple[Tensor, Tensor]] | None = None,
    hooked: HookedBlock | None = None,
) -> list[Reading]:
    """What to read in the backward so that ``edges`` is filled.

    Args:
        model: The bridge.
        edges: Of one block; filled by the backward.
        sites: ``find_sites(model)``.
        rule_set: The rules of that backward.
        call: Recorded in the forward; used where tangents are needed.
        biased: ``biased_blocks(model)``.
        seen: Gives v of all sources, [source, kv_head, d_head], where a run computes only some.
        moved: Gives what ``block_tangents`` gives, likewise.
        hooked: Where the user has hooks in the block. What they add to keys, values or scores
            takes no relevance, as biases do not, so tangents are needed where they edit; and the
            gradient at pattern·v is read before they change it.
    """
    prefix = f"blocks.{edges.layer}.attn."
    constant_pattern = rule_set.softmax == "constant"
    tangents = needs_tangents(edges.layer, sites, rule_set, biased)
    key_share = 0.5 if rule_set.qk == "half" else 1.0
    value_share = 0.5 if rule_set.pattern_v == "half" else 1.0
    kept = edges._kept

    def keep(name: str) -> Callable[[Tensor], None]:
        def fired(x: Tensor) -> None:
            kept[name] = x[0]

        return fired

    def ignore(x: Tensor, g: Tensor) -> None:
        """The activation was all that was wanted."""

    by_operation = any(
        site.operation == "attention" and f"{site.path}." == prefix for site in sites
    )

    early = hooked is not None and not by_operation

    def by_tangents() -> bool:
        return tangents or (hooked is not None and hooked.edited())

    def at_z(_: Tensor, g: Tensor) -> None:
        if by_tangents():
            v, kept["scores"] = (
                block_tangents(model, edges.layer, call, sites, rule_set)
                if moved is None
                else moved()
            )
        else:
            v = edges.seen("v") if seen is None else seen()
        pattern = edges.seen("pattern")
        g_z = at_least_float32(g[0])
        g_z = g_z if by_operation else g_z.transpose(0, 1)
        v = at_least_float32(v).transpose(0, 1).repeat_interleave(len(g_z) // v.shape[1], dim=0)
        # upstream of the user's hooks the rule has halved the gradient already
        share = 1.0 if early else value_share
        edges.add("value", pattern, g_z @ v.transpose(-1, -2), share)

    def at_pattern(x: Tensor, g: Tensor) -> None:
        edges.add("value", x[0], g[0])

    def at_scores(x: Tensor, g: Tensor) -> None:
        if by_tangents() and "scores" not in kept and moved is None:  # nothing came through z
            _, kept["scores"] = block_tangents(model, edges.layer, call, sites, rule_set)
        edges.add("key", kept.pop("scores") if by_tangents() else x[0], g[0], key_share)

    readings = []
    if tangents or constant_pattern or hooked is not None:
        readings.append(Reading(f"{prefix}hook_pattern", ignore, fired=keep("pattern")))
        if early:
            assert hooked is not None
            hooked.at_z = at_z
        else:
            readings.append(Reading(f"{prefix}z" if by_operation else f"{prefix}o.hook_in", at_z))
        if not tangents and seen is None:
            readings.append(Reading(f"{prefix}v.hook_out", ignore, fired=keep("v")))
    else:
        readings.append(Reading(f"{prefix}hook_pattern", at_pattern))
    if not constant_pattern:
        readings.append(Reading(f"{prefix}hook_attn_scores", at_scores))
    return readings
