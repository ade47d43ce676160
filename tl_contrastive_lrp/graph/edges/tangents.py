"""Derivatives of a block's values and scores along the residual stream, in forward mode.

Edges need v and S without what biases contributed, that is, their derivatives along the residual
vector itself under the rules: ṽ = J_v(h)·h and S̃ = scale · ⟨q, J_k(h)·h⟩. The block runs once more
on its own input with that direction as a tangent, with queries held fixed and norms and soft-caps
linearised as the rules say, and stops as soon as it has the scores. RoPE, grouped queries, key
norms, scale and masks are the model's own code, so nothing here depends on the model's family.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...engine.reading import BlockCall
from ...errors import UncoveredComponentError
from ...hooks.attach import HookFn, norm_weight, uses_native_norm, where_computed
from ...hooks.by_operation.mode import MATRIX_PRODUCTS, OperationRules
from ...hooks.by_operation.patterns import NORMS, NormCall, is_root
from ...hooks.placement import own_hooks
from ...hooks.sites import Site
from ...inputs.bridge import hook_points, public_name
from ...rules.deferred import is_product
from ...rules.functions import at_least_float32
from ...rules.precision import plain, wide
from ...rules.rule_sets import RuleSet
from ...rules.softcap import softcap_ratio, softcap_replaced
from ...rules.threads import active_in


class Tangents(NamedTuple):
    """Derivatives of one block along the residual vector.

    Attributes:
        v: The values' derivative ṽ, before they are repeated for grouped queries.
        scores: The scores' derivative S̃, with the queries held fixed.
    """

    v: Float[Tensor, "source kv_head d_head"]
    scores: Float[Tensor, "head target source"]


class ProductTangents(NamedTuple):
    """Derivatives along the residual vector of what enters the two products of attention.

    Attributes:
        v: The values' derivative ṽ.
        keys: The keys' derivative k̃.
    """

    v: Float[Tensor, "kv_head source d_head"]
    keys: Float[Tensor, "kv_head source d_head"]


class _Stop(Exception):
    """Raised when the scores have been read: the rest of the block is not needed."""


def tangent_of(x: Tensor) -> Tensor:
    """The derivative that a dual tensor carries; 0 if it carries none."""
    tangent: Tensor | None = forward_ad.unpack_dual(x).tangent
    return torch.zeros_like(x) if tangent is None else tangent


def _primal(x: Tensor) -> Tensor:
    primal: Tensor = forward_ad.unpack_dual(x).primal
    return primal


def dual(primal: Tensor, tangent: Tensor) -> Tensor:
    """A value that carries its derivative."""
    pair: Tensor = forward_ad.make_dual(primal, tangent)
    return pair


def _only_value(tensor: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
    return _primal(tensor)


def _norm_hooks(site: Site) -> list[tuple[str, HookFn]]:
    """Hooks that hold a norm's denominator fixed, in forward mode."""
    if not uses_native_norm(site.component):
        return [(f"{site.path}.hook_scale", _only_value)]
    seen: dict[str, Tensor] = {}

    def observe(name: str) -> HookFn:
        def hook_fn(tensor: Tensor, hook: Any) -> None:  # noqa: ARG001
            seen[name] = tensor

        return hook_fn

    def rebuild(output: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        normalized, scale = seen["normalized"], seen["scale"]
        value = _primal(normalized)
        moved = tangent_of(normalized) + value * tangent_of(scale) / _primal(scale)
        return dual(_primal(output), (norm_weight(site.component, value) * moved).to(output.dtype))

    return [
        (f"{site.path}.hook_scale", observe("scale")),
        (f"{site.path}.hook_normalized", observe("normalized")),
        (f"{site.path}.hook_out", rebuild),
    ]


def _linear_softcap(y: Tensor, x: Tensor, cap: float) -> Tensor:
    """A soft-cap's output y, with the tangent that the identity rule gives it."""
    return dual(_primal(y), tangent_of(x) * softcap_ratio(_primal(x) / cap))


class _Linearised(OperationRules):
    """Linearises norms and functions inside a wrapped module as the rules say, in forward mode."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        out = func(*args, **kwargs)
        if not self.states or not self.states[-1]:
            return out
        ratio = self.ratio(name, args, kwargs)
        if ratio is not None:
            x = args[0]
            return dual(_primal(out), tangent_of(x) * ratio(_primal(x)))
        if self.rule_set.norm != "ln":
            return out
        if name in NORMS:
            call = NormCall.of(name, args, kwargs)
            moved = call.moved(tangent_of(call.x))
            return dual(_primal(out), moved.to(out.dtype))
        return _primal(out) if is_root(name, args, out) else out


class _AttentionTangents(_Linearised):
    """Reads S̃ and ṽ inside a module that computes attention itself, with queries held fixed."""

    def __init__(self, rule_set: RuleSet, read: dict[str, Tensor], heads: int) -> None:
        super().__init__(rule_set, attention=True, heads=heads)
        self.read = read

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if not self.states or not self.states[-1]:
            return func(*args, **kwargs)
        if name == "softmax":
            self.read["scores"] = self.by_head(tangent_of(args[0]))[0]
            self.after_softmax = True
            return _primal(func(*args, **kwargs))
        if name not in MATRIX_PRODUCTS:
            return super().__torch_function__(func, types, args, kwargs)
        if self.after_softmax:
            v = self.by_head(tangent_of(args[-1]))[0]
            self.read["v"] = rearrange(v, "head source d_head -> source head d_head")
            raise _Stop
        *first, query, key = args
        return func(*first, _primal(query), key, **kwargs)


class _AtProduct(TorchFunctionMode):
    """Stops a component at its product of queries and keys, and reads k̃ there."""

    def __init__(self, read: dict[str, Tensor]) -> None:
        super().__init__()
        self.read = read

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if is_product(func, args, kwargs):
            self.read["keys"] = at_least_float32(plain(tangent_of(args[1])))[0].mT
            raise _Stop
        return func(*args, **(kwargs or {}))


def block_tangents(
    model: Any, layer: int, call: BlockCall, sites: tuple[Site, ...], rule_set: RuleSet
) -> Tangents:
    """The derivatives ṽ and S̃ of one block, for the first row of its batch.

    Args:
        model: The bridge, without rules attached.
        layer: Index of the block.
        call: The arguments of the block.
        sites: ``find_sites(model)``.
        rule_set: The rules, which say which of the block's norms and soft-caps are linearised.

    Returns:
        ṽ before it is repeated for grouped queries, [pos, kv_head, d_head], and S̃ as at
        ``hook_attn_scores``, [head, query, key]. If the rules act on the attention's operations,
        ṽ is as it enters pattern·v, [pos, head, d_head].

    Raises:
        UncoveredComponentError: A user's hook in the block has no derivative in forward mode.
    """
    read: dict[str, Tensor] = {}
    _run_with_tangents(model, layer, call, sites, rule_set, read)
    return Tangents(read["v"], read["scores"])


def product_tangents(
    model: Any, layer: int, call: BlockCall, sites: tuple[Site, ...], rule_set: RuleSet
) -> ProductTangents:
    """The derivatives ṽ and k̃ of a block whose attention is fused, for the first row of its batch.

    Args:
        model: The bridge, without rules attached.
        layer: Index of the block.
        call: The arguments of the block.
        sites: ``find_sites(model)``.
        rule_set: The rules, which say which of the block's norms are linearised.

    Raises:
        UncoveredComponentError: As ``block_tangents``.
    """
    read: dict[str, Tensor] = {}
    with active_in(_AtProduct(read), model.blocks[layer].attn):
        _run_with_tangents(model, layer, call, sites, rule_set, read)
    v = rearrange(at_least_float32(read["v"]), "source kv_head d -> kv_head source d")
    return ProductTangents(v, read["keys"])


def _run_with_tangents(
    model: Any,
    layer: int,
    call: BlockCall,
    sites: tuple[Site, ...],
    rule_set: RuleSet,
    read: dict[str, Tensor],
) -> None:
    """Run a block in forward mode until ``read`` has what is wanted."""
    prefix = f"blocks.{layer}."

    def start(tensor: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return dual(_primal(tensor), wide(_primal(tensor).clone()))

    def read_value(tensor: Tensor, hook: Any) -> None:  # noqa: ARG001
        read["v"] = plain(tangent_of(tensor))[0]

    def read_scores(tensor: Tensor, hook: Any) -> None:  # noqa: ARG001
        read["scores"] = plain(tangent_of(tensor))[0]
        raise _Stop

    hooks: list[tuple[str, HookFn]] = [(f"{prefix}hook_in", start)]
    with ExitStack() as stack:
        inside = [site for site in sites if site.path.startswith(prefix)]
        if any(site.operation == "attention" for site in inside):
            component = model.blocks[layer].attn
            reader = _AttentionTangents(rule_set, read, int(model.cfg.n_heads))
            stack.enter_context(reader.around(where_computed(component)))
        else:
            hooks += [
                (f"{prefix}attn.q.hook_out", _only_value),
                (f"{prefix}attn.v.hook_out", read_value),
                (f"{prefix}attn.hook_attn_scores", read_scores),
            ]
        for site in inside:
            if site.operation == "norm" and rule_set.norm == "ln":
                hooks += _norm_hooks(site)
            if site.operation == "wrapped":
                linear = _Linearised(rule_set, attention=False)
                stack.enter_context(linear.around(site.component.original_component))
            if site.operation == "softcap" and rule_set.softcap == "identity":
                cap = softcap_replaced(site.module, "attn_logit_softcapping", _linear_softcap)
                stack.enter_context(cap)
        hook_dict = hook_points(model)
        named = [(public_name(hook_dict, name), fn) for name, fn in hooks]
        stack.enter_context(torch.no_grad())
        stack.enter_context(forward_ad.dual_level())
        stack.enter_context(own_hooks(model, named))
        try:
            args, kwargs = call.again()
            model.blocks[layer](*args, **kwargs)
        except _Stop:
            return
        except NotImplementedError as error:
            raise UncoveredComponentError(
                f"No graph of blocks.{layer} with your hooks on it: one of those before its "
                "attention scores uses a function whose derivative torch cannot take forward "
                "(clrp.rules.identity, clrp.rules.uniform, or an autograd.Function without jvp). "
                "Relevance itself is right: use clrp.attribute, or transitions over several "
                "blocks (attribution_graph(..., layers=[...]))."
            ) from error
    raise RuntimeError(f"blocks.{layer} never computed attention scores.")
