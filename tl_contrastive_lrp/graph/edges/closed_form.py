"""Edges of the attribution graph in closed form, read during one backward pass.

Tokens mix only in attention, so the relevance that target position j passes to source position
i ≠ j within a block went through attention's values or keys. With g_z and g_S, the gradients that
the one backward pass brings to attention's output and scores, and per head h:

    value path   A[j, i] = α_v · P[j, i] · ⟨g_z[j], ṽ[i]⟩
    key path     A[j, i] = α_k · g_S[j, i] · S̃[j, i],      S̃ = scale · ⟨q[j], k̃[i]⟩

α is the factor that the rules apply (½ for halved products). ṽ and k̃ are the derivatives of v and
k along the residual vector: v and k without what biases contributed. A position's own share needs
no formula. Since Σ_j A[j, i] is the source's relevance R_s[i], it is what remains:

    A[i, i] = R_s[i] − Σ_{j≠i} A[j, i]        (residual, queries, MLP, and attention to itself).

arXiv:2604.17761, Appendix A, computes the same matrices with batches of backward passes.

Where no bias reaches keys and values and norms and soft-caps are linearised, ṽ = v and S̃ = S, and
both paths are gradient × value at ``hook_pattern`` and ``hook_attn_scores``. Otherwise
``tangents.py`` gives ṽ and S̃, also during the backward: nothing of size head × pos² outlives its
layer except what autograd itself keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from ...engine.reading import BlockCall, Reading, tap
from ...hooks.sites import Site, scores_are_biased
from ...inputs.bridge import bias_of, components, hook_points
from ...rules.functions import at_least_float32
from ...rules.precision import plain
from ...rules.query_tiles import Rows
from ...rules.rule_sets import RuleSet
from ...rules.threads import mine
from .tangents import ProductTangents, Tangents, block_tangents, product_tangents


@dataclass(eq=False)
class BlockEdges:
    """The relevance that one block's attention passes between positions, filled by a backward.

    Attributes:
        layer: Index of the block.
        by_head: Whether ``value`` and ``key`` are kept.
        again: Whether another backward of the same forward follows, for which the captured
            activations have to be kept.
        total: Sum over heads and paths, with the diagonal (attention to itself) included.
        value: The value path by head, on the CPU.
        key: The key path by head, on the CPU.
        scores_tangent: S̃, from the time that the value path needed ṽ until the key path uses it.
    """

    layer: int
    by_head: bool
    again: bool = False
    total: Float[Tensor, "target source"] | None = None
    value: Float[Tensor, "head target source"] | None = None
    key: Float[Tensor, "head target source"] | None = None
    scores_tangent: Float[Tensor, "head target source"] | None = None
    _captured: dict[str, Tensor] = field(default_factory=dict)

    def capture(self, name: str) -> Callable[[Tensor], None]:
        """A callback that keeps an activation of the forward, [batch, ...], under ``name``."""

        def keep(x: Tensor) -> None:
            self._captured[name] = x[0]

        return keep

    def captured(self, name: str) -> Tensor:
        """A captured activation, which is released unless another backward needs it."""
        return self._captured[name] if self.again else self._captured.pop(name)

    def has(self, name: str) -> bool:
        """Whether an activation has been captured under ``name``."""
        return name in self._captured

    def clear(self) -> None:
        """Discard the edges of the last backward."""
        self.total = self.value = self.key = self.scores_tangent = None

    def restart(self) -> None:
        """Discard the edges and the captured activations, before the block runs on another tile."""
        self.clear()
        self._captured.clear()

    def put(
        self,
        shape: tuple[int, int],
        start: int,
        first: int,
        total: Float[Tensor, "row source"],
        value: Float[Tensor, "head row source"] | None,
        key: Float[Tensor, "head row source"] | None,
    ) -> None:
        """Put some rows into the matrices, which are 0 elsewhere.

        Args:
            shape: That of the matrices, [target, source].
            start: The first target of the rows.
            first: The first source of the rows.
            total: Sum over heads and paths.
            value: The value path by head, if edges are split.
            key: The key path by head, if edges are split and the rules give it relevance.
        """
        own = slice(start, start + len(total)), slice(first, first + total.shape[1])
        if self.total is None:
            self.total = total.new_zeros(shape)
        self.total[own] = total
        for name, rows in (("value", value), ("key", key)):
            if rows is None:
                continue
            if getattr(self, name) is None:
                setattr(self, name, rows.new_zeros(len(rows), *shape, device="cpu"))
            getattr(self, name)[:, own[0], own[1]] = rows.cpu()

    def add(
        self,
        path: Literal["value", "key"],
        a: Float[Tensor, "head target source"],
        b: Float[Tensor, "head target source"],
        factor: float = 1.0,
    ) -> None:
        """Add the edges of one path, factor · a ⊙ b."""
        a, b = at_least_float32(a), at_least_float32(b)
        if self.by_head:
            setattr(self, path, _product(a, b, factor).cpu())
        total = a.new_zeros(a.shape[1:]) if self.total is None else self.total.clone()
        for head in range(len(a)):  # in place: no temporary of all heads
            total.addcmul_(a[head], b[head], value=factor)
        if not bool(torch.isfinite(total.sum())):
            total = _product(a, b, factor).sum(0) + (0.0 if self.total is None else self.total)
        self.total = total


def _product(a: Tensor, b: Tensor, factor: float) -> Tensor:
    """The product factor · a ⊙ b, with 0 where b is 0: a masked score (-inf) adds nothing."""
    return (factor * a * b).masked_fill(b == 0, 0.0)


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


def attention_by_operation(layer: int, sites: tuple[Site, ...]) -> bool:
    """Whether the rules of this block's attention act on its operations, inside the module."""
    return any(
        site.operation == "attention" and site.path == f"blocks.{layer}.attn" for site in sites
    )


@dataclass(eq=False)
class HookedBlock:
    """A block on which the user has hooks.

    Attributes:
        layer: Index of the block.
        edited: Returns, once the forward has run, whether one of the hooks changed a value.
        quiet: Returns whether gradients are to be ignored at the moment.
        at_z: Called during the backward with attention's output pattern·v before any hook and its
            gradient, both [1, pos, head, d_head].
    """

    layer: int
    edited: Callable[[], bool]
    quiet: Callable[[], bool]
    at_z: Callable[[Tensor, Tensor], None] | None = None

    @contextmanager
    def before_hooks(self, model: Any) -> Iterator[None]:
        """Call ``at_z`` in the backwards of what the model runs inside the block."""

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


class AttentionInputs(Protocol):
    """Where the closed form gets a block's values, and the derivatives of values and scores.

    In one pass they are those of the whole prompt (``PromptInputs``); in tiles, those of the tile
    that is being replayed (``tiled.py``).
    """

    def readings(self) -> list[Reading]:
        """The readings that the forward needs before ``values`` can be called."""
        ...

    def values(self) -> Float[Tensor, "source kv_head d_head"]:
        """The values v of all sources."""
        ...

    def tangents(self) -> Tangents:
        """The derivatives ṽ and S̃, as ``block_tangents`` gives them."""
        ...

    def product_tangents(self) -> ProductTangents:
        """The derivatives ṽ and k̃, as they enter the two products."""
        ...


@dataclass(frozen=True, eq=False)
class PromptInputs:
    """Values and derivatives of the whole prompt, for a backward in one pass.

    Attributes:
        edges: The block's edges, which also keep its values from the forward to the backward.
        model: The bridge.
        sites: ``find_sites(model)``.
        rule_set: The rules of the backward.
        call: The arguments of the block, recorded in the forward.
    """

    edges: BlockEdges
    model: Any
    sites: tuple[Site, ...]
    rule_set: RuleSet
    call: BlockCall

    def readings(self) -> list[Reading]:
        """The values, captured in the forward."""
        name = f"blocks.{self.edges.layer}.attn.v.hook_out"
        return [Reading(name, ignore_gradient, fired=self.edges.capture("v"))]

    def values(self) -> Float[Tensor, "source kv_head d_head"]:
        """The values v of all positions."""
        return self.edges.captured("v")

    def tangents(self) -> Tangents:
        """The derivatives ṽ and S̃, from running the block once more."""
        return block_tangents(self.model, self.edges.layer, self.call, self.sites, self.rule_set)

    def product_tangents(self) -> ProductTangents:
        """The derivatives ṽ and k̃, from running the block once more up to its scores."""
        return product_tangents(self.model, self.edges.layer, self.call, self.sites, self.rule_set)


def ignore_gradient(x: Tensor, g: Tensor) -> None:
    """The sink of a reading that only captures the activation."""


class RowTarget(Protocol):
    """What takes edges a tile of target positions at a time (``StreamedEdges``)."""

    @property
    def heads(self) -> int:
        """How many heads edges are split by; 0 for none."""
        ...

    def add(
        self,
        start: int,
        first: int,
        total: Float[Tensor, "target source"],
        value: Float[Tensor, "head target source"] | None = None,
        key: Float[Tensor, "head target source"] | None = None,
    ) -> None:
        """Add the edges of a tile, which lies above all added so far."""
        ...


@dataclass(eq=False)
class AttentionReader:
    """Fills one block's edges from the gradients that a backward sends to its attention.

    Attributes:
        edges: The edges to fill.
        inputs: Where values and their derivatives come from.
        rule_set: The rules of the backward.
        tangents: Whether the closed form needs derivatives here even if no hook edits.
        by_operation: Whether the rules act on the attention's operations, inside the module; then
            its output is [head, target, d_head], else [target, head, d_head].
        hooked: The block, if the user has hooks on it. What a hook adds to keys, values or scores
            takes no relevance, as biases do not, so derivatives are needed where one edits; and
            the gradient at pattern·v is read before a hook changes it.
        target: Returns what takes the edges where the attention is fused, so that ``edges`` stays
            empty; None if edges are read from scores and pattern only.
    """

    edges: BlockEdges
    inputs: AttentionInputs
    rule_set: RuleSet
    tangents: bool
    by_operation: bool
    hooked: HookedBlock | None = None
    target: Callable[[], RowTarget] | None = None
    _products: ProductTangents | None = None

    def readings(self) -> list[Reading]:
        """What to read, and where."""
        eager = self._eager()
        if self.target is None or self.hooked is not None or self.by_operation:
            return eager
        point = f"blocks.{self.edges.layer}.attn.hook_pattern"
        return [Reading(point, self._at_rows, "rows", eager=tuple(eager))]

    def _eager(self) -> list[Reading]:
        """What to read where scores and pattern are computed."""
        prefix = f"blocks.{self.edges.layer}.attn."
        readings = []
        if self.tangents or self.rule_set.softmax == "constant" or self.hooked is not None:
            readings.append(
                Reading(
                    f"{prefix}hook_pattern", ignore_gradient, fired=self.edges.capture("pattern")
                )
            )
            if self._before_hooks:
                assert self.hooked is not None
                self.hooked.at_z = self._at_z
            else:
                name = f"{prefix}z" if self.by_operation else f"{prefix}o.hook_in"
                readings.append(Reading(name, self._at_z))
            if not self.tangents:
                readings += self.inputs.readings()
        else:
            readings.append(Reading(f"{prefix}hook_pattern", self._at_pattern))
        if self.rule_set.softmax != "constant":
            readings.append(Reading(f"{prefix}hook_attn_scores", self._at_scores))
        return readings

    @property
    def _before_hooks(self) -> bool:
        """Whether the gradient at pattern·v is read before the user's hooks change it."""
        return self.hooked is not None and not self.by_operation

    def _uses_tangents(self) -> bool:
        return self.tangents or (self.hooked is not None and self.hooked.edited())

    def _at_z(self, _: Tensor, g: Tensor) -> None:
        """The value path, from the gradient at attention's output."""
        if self.target is not None and not self.edges.has("pattern"):
            return  # its rows have come instead
        if self._uses_tangents():
            v, scores = self.inputs.tangents()
            if self.rule_set.softmax != "constant":
                self.edges.scores_tangent = scores
        else:
            v = self.inputs.values()
        pattern = self.edges.captured("pattern")
        g_z = at_least_float32(g[0])
        axes = "head target d_head" if self.by_operation else "target head d_head"
        v = repeat(
            at_least_float32(v),
            "source kv_head d_head -> source (kv_head group) d_head",
            group=pattern.shape[0] // v.shape[1],
        )
        passed = einsum(g_z, v, f"{axes}, source head d_head -> head target source")
        # Where it is read before the user's hooks, the rule has already halved the gradient.
        halved = self.rule_set.pattern_v == "half" and not self._before_hooks
        self.edges.add("value", pattern, passed, 0.5 if halved else 1.0)

    def _at_pattern(self, x: Tensor, g: Tensor) -> None:
        """The value path where ṽ = v: gradient × value at the pattern."""
        self.edges.add("value", x[0], g[0])

    def _at_scores(self, x: Tensor, g: Tensor) -> None:
        """The key path, from the gradient at the scores."""
        scores = x[0]
        if self._uses_tangents():
            tangent, self.edges.scores_tangent = self.edges.scores_tangent, None
            # None if no gradient came through z
            scores = self.inputs.tangents().scores if tangent is None else tangent
        self.edges.add("key", scores, g[0], 0.5 if self.rule_set.qk == "half" else 1.0)

    def _at_rows(self, rows: Rows) -> None:
        """Both paths of some target positions, from the rows of fused attention."""
        assert self.target is not None
        target = self.target()
        factor = 0.5 if self.rule_set.qk == "half" else 1.0
        value, products = rows.share, rows.products
        if self.tangents:
            if self._products is None:
                self._products = self.inputs.product_tangents()
            own = slice(rows.first, rows.first + rows.pattern.shape[-1])
            value = _by_group(rows.g, self._products.v[:, own]).mul_(rows.pattern)
            products = _by_group(rows.q, self._products.keys[:, own])
        if rows.start == 0:  # the last tile
            self._products = None
        to_products = rows.to_products
        if target.heads:
            key = None if to_products is None else (to_products * products).mul_(factor)
            total = value.sum(0) if key is None else value.sum(0).add_(key.sum(0))
            target.add(rows.start, rows.first, total, value, key)
            return
        if to_products is not None:
            value.addcmul_(to_products, products, value=factor)
        target.add(rows.start, rows.first, value.sum(0))


def _by_group(
    x: Float[Tensor, "head target d"], y: Float[Tensor, "kv_head source d"]
) -> Float[Tensor, "head target source"]:
    """⟨x, y⟩ for each head, whose key head several heads share."""
    heads, targets, _ = x.shape
    groups = rearrange(x, "(kv group) target d -> kv (group target) d", kv=len(y))
    return torch.bmm(groups, y.mT).view(heads, targets, -1)


def edge_readings(
    model: Any,
    edges: BlockEdges,
    sites: tuple[Site, ...],
    rule_set: RuleSet,
    call: BlockCall,
    biased: frozenset[int],
    *,
    inputs: AttentionInputs | None = None,
    hooked: HookedBlock | None = None,
    target: Callable[[], RowTarget] | None = None,
) -> list[Reading]:
    """What to read in a backward so that a block's edges are filled.

    Args:
        model: The bridge.
        edges: The edges of one block; the backward fills them.
        sites: ``find_sites(model)``.
        rule_set: The rules of that backward.
        call: The arguments of the block, recorded in the forward; used where derivatives are
            needed.
        biased: ``biased_blocks(model)``.
        inputs: Where values and their derivatives come from; by default, from the whole prompt.
        hooked: The block, if the user has hooks on it.
        target: Returns what takes the edges where the attention is fused.
    """
    reader = AttentionReader(
        edges,
        PromptInputs(edges, model, sites, rule_set, call) if inputs is None else inputs,
        rule_set,
        tangents=needs_tangents(edges.layer, sites, rule_set, biased),
        by_operation=attention_by_operation(edges.layer, sites),
        hooked=hooked,
        target=target,
    )
    return reader.readings()
