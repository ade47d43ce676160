"""Whether the closed form of a graph's edges holds on a model: measured once, on four tokens.

The closed form (``edges.py``) knows one way from one position to another: keys and values of the
block's attention. A block that mixes tokens elsewhere too (a convolution, a recurrence, a shift of
its keys) may have a rule for every operation, and so relevance, and still break it. Here every
block's edges are compared with those of autograd, one target position at a time, under the same
rules; what differs is refused.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from .audit_model import audit
from .audit_report import Audit
from .audit_run import hooks_aside, same_random_numbers, some_tokens
from .backward import run
from .edges import BlockEdges, biased_blocks, edge_readings
from .errors import UncoveredComponentError
from .explain import residual_sites
from .packed import edges_by_position
from .precision import is_low
from .rulesets import RuleSet
from .sites import find_sites
from .tangents import BlockCall

# Of the largest edge of the transition; rounding is far below, a missing path far above.
_LIMIT = 1e-3
_LIMIT_LOW = 3e-2  # bfloat16 and float16 forwards

_known: WeakKeyDictionary[Any, tuple[Audit, set[RuleSet]]] = WeakKeyDictionary()


def _objective(logits: Float[Tensor, "1 pos vocab"]) -> Float[Tensor, ""]:
    """A fixed mixture of all logits, so that relevance starts at every position."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(logits.shape, generator=generator).to(logits.device)
    return (logits.float() * weights).sum()


def closed_form_errors(model: Any, rule_set: RuleSet) -> list[float]:
    """By block, how far the closed form is from autograd, over the block's largest edge."""
    tokens, sites = some_tokens(model), find_sites(model)
    found = [BlockEdges(i, by_head=False) for i in range(int(model.cfg.n_layers))]
    calls, biased = [BlockCall() for _ in found], biased_blocks(model)
    readings = [
        reading
        for edges, call in zip(found, calls, strict=True)
        for reading in edge_readings(model, edges, sites, rule_set, call, biased)
    ]
    scopes = [call.recorded(model.blocks[e.layer]) for e, call in zip(found, calls, strict=True)]
    with hooks_aside(model), same_random_numbers(model):
        run(model, tokens, _objective, rule_set, readings, scopes)
        steps = list(pairwise(residual_sites(model)))
        exact = edges_by_position(model, tokens, _objective, rule_set, steps)
    errors = []
    for edges, wanted in zip(found, exact, strict=True):
        total = torch.zeros_like(wanted) if edges.total is None else edges.total.cpu()
        off = (total - wanted).fill_diagonal_(0.0).abs().max()
        errors.append(float(off / wanted.abs().max().clamp_min(1e-30)))
    return errors


def require_closed_form(model: Any, rule_set: RuleSet) -> None:
    """Refuse a model in which tokens mix where the closed form does not look.

    Raises:
        UncoveredComponentError: names the blocks.
    """
    report = audit(model)
    known = _known.get(model)
    good = known[1] if known is not None and known[0] is report else set[RuleSet]()
    if rule_set in good:
        return
    without = [i for i, block in enumerate(model.blocks) if not hasattr(block, "attn")]
    if without:
        raise _refused(model, without, "they have no attention")
    limit = _LIMIT_LOW if is_low(model) else _LIMIT
    errors = closed_form_errors(model, rule_set)
    wrong = [i for i, error in enumerate(errors) if not error <= limit]
    if wrong:
        raise _refused(
            model,
            wrong,
            f"autograd finds edges up to {max(errors):.1e} of the largest one that attention's "
            "keys and values do not account for",
        )
    good.add(rule_set)
    _known[model] = (report, good)


def _refused(model: Any, blocks: list[int], why: str) -> UncoveredComponentError:
    shown = ", ".join(f"blocks.{i}" for i in blocks[:4]) + (", ..." if len(blocks) > 4 else "")
    kind = type(model.blocks[blocks[0]].original_component).__name__
    return UncoveredComponentError(
        f"No graph of {shown} ({kind}): {why}, so tokens mix outside attention there, or in a way "
        "that the edges' closed form does not describe. Relevance itself is right: use "
        "clrp.attribute or clrp.run_with_relevance, or transitions over several blocks, which "
        "need no closed form (attribution_graph(..., layers=[...]))."
    )
