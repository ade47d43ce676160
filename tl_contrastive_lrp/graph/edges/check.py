"""Whether the closed form of a graph's edges holds on a model: measured once, on four tokens.

In the closed form (``closed_form.py``) relevance moves between positions only through the keys and
values of the block's attention. A block that also mixes tokens elsewhere (a convolution, a
recurrence, a shift of its keys) may have a rule for every operation, and therefore relevance, and
still break the closed form.
Here every block's edges are compared with those of autograd, one target position at a time, under
the same rules, and a model on which they differ is refused. Both come from one forward, whose graph
``RecordedSites`` keeps. It also checks the edges of a run in which the user's hooks change values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from ...engine.plain import forward
from ...engine.reading import BlockCall, Reading
from ...errors import UncoveredComponentError
from ...hooks.attach import HookFn
from ...hooks.audit.audit import Audit, audit_of, hooks_aside, same_random_numbers, some_tokens
from ...hooks.hook_rules import HookWatch
from ...hooks.placement import reading_hooks
from ...hooks.sites import find_sites
from ...inputs.bridge import residual_sites
from ...rules.functions import at_least_float32
from ...rules.precision import is_low, plain
from ...rules.rule_sets import RuleSet
from .closed_form import BlockEdges, biased_blocks, edge_readings

# Largest error, relative to the largest edge of the transition. Rounding is far below it, a missing
# path far above.
_LIMIT = 1e-3
_LIMIT_LOW = 3e-2  # bfloat16 and float16 forwards

# How many sums may follow each other where ``RecordedSites`` bounds rounding.
_LAYERS_OF_SUMS = 64

# By model: the audit at the time, and the rule sets under which the closed form was found to hold.
_checked: WeakKeyDictionary[Any, tuple[Audit, set[RuleSet]]] = WeakKeyDictionary()


def _objective(logits: Float[Tensor, "1 pos vocab"]) -> Float[Tensor, ""]:
    """A fixed mixture of all logits, so that relevance starts at every position."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(logits.shape, generator=generator).to(logits.device)
    return (logits.float() * weights).sum()


def closed_form_errors(model: Any, rule_set: RuleSet) -> list[float]:
    """The closed form's largest error in each block, relative to the block's largest edge."""
    tokens, sites = some_tokens(model), find_sites(model)
    recorded = RecordedSites(residual_sites(model))
    edges_by_block = [BlockEdges(i, by_head=False) for i in range(int(model.cfg.n_layers))]
    calls, biased = [BlockCall() for _ in edges_by_block], biased_blocks(model)
    readings = [
        recorded.listening(reading)
        for edges, call in zip(edges_by_block, calls, strict=True)
        for reading in edge_readings(model, edges, sites, rule_set, call, biased)
    ]
    scopes = [
        partial(call.recorded, model.blocks[edges.layer])
        for edges, call in zip(edges_by_block, calls, strict=True)
    ]
    with hooks_aside(model), same_random_numbers(model):
        one = forward(
            model, tokens, rule_set, readings, [*scopes, partial(recorded.recording, model)]
        )
        one.backward(one.value(_objective), more=True)
        exact_by_block = [recorded.exact(*step) for step in pairwise(recorded.sites)]
    errors = []
    for edges, exact in zip(edges_by_block, exact_by_block, strict=True):
        total = torch.zeros_like(exact) if edges.total is None else edges.total.cpu()
        error = (total - exact).fill_diagonal_(0.0).abs().max()
        errors.append(float(error / exact.abs().max().clamp_min(1e-30)))
    return errors


def require_closed_form(model: Any, rule_set: RuleSet) -> None:
    """Refuse a model in which tokens mix where the closed form does not account for it.

    The result is remembered until the model's audit changes.

    Raises:
        UncoveredComponentError: The closed form does not hold; names the blocks.
    """
    report = audit_of(model)
    checked = _checked.get(model)
    valid = checked[1] if checked is not None and checked[0] is report else set[RuleSet]()
    if rule_set in valid:
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
    valid.add(rule_set)
    _checked[model] = (report, valid)


@dataclass(eq=False)
class RecordedSites:
    """The residual stream of one run on its autograd graph, to check the run's edges against it.

    ``exact`` sends a backward signal for each target position, which suits a few tokens. For the
    prompts of users, ``require`` checks all targets at once. A user's hook may move values between
    positions in ways that the closed form misses. With random weights w_j for the target positions,
    Σ_j w_j A[j, i] must equal

        Σ_d x_s[i, d] · ∂⟨w ⊙ g_t, x_t⟩/∂x_s[i, d],

    which takes one backward through the transition (Freivalds' check of a matrix product). The
    weights are Gaussian rather than signs: since the diagonal of A is what is left of its column,
    an edge that is wrong by e shows as e·(w_j − w_i). There are two independent draws.

    Both sides are float32 sums of up to n terms, about a dozen of them one after the other. The
    rounding of one sum stays below √n · eps of its sum of absolute terms, except with negligible
    probability, and ``_LAYERS_OF_SUMS`` bounds how many follow each other.

    Attributes:
        sites: HookPoints between which the transitions are.
        quiet: True while a backward of this check runs, from which nothing may be read.
    """

    sites: tuple[str, ...]
    quiet: bool = False
    _at: dict[str, Tensor] = field(default_factory=dict)
    _gradients: dict[str, Tensor] = field(default_factory=dict)

    @contextmanager
    def recording(self, model: Any) -> Iterator[None]:
        """Keep each site's tensor and, in the backward, its gradient; enter it last."""

        def keep(name: str) -> HookFn:
            def note(g: Tensor) -> None:
                if not self.quiet:
                    self._gradients[name] = g.detach()

            def hook_fn(tensor: Any, hook: Any) -> None:  # noqa: ARG001
                if tensor.requires_grad:
                    self._at[name] = tensor
                    tensor.register_hook(note)

            return hook_fn

        with reading_hooks(model, [(name, keep(name)) for name in self.sites]):
            yield

    def listening(self, reading: Reading) -> Reading:
        """The same reading, except that it ignores the backwards of this check."""

        def sink(*values: Any) -> None:
            if not self.quiet:
                reading.sink(*values)

        return replace(reading, sink=sink)

    def exact(self, source: str, target: str) -> Float[Tensor, "target source"]:
        """The edges of a transition, from one backward signal for each target position.

        Args:
            source: The source site.
            target: The target site.
        """
        h = at_least_float32(self._at[source].detach())[0]
        edges = h.new_zeros(len(h), len(h))
        if target not in self._gradients:  # no relevance arrives there
            return edges.cpu()
        g = self._gradients[target]
        for j in range(len(h)):
            here = torch.zeros(len(h), 1, dtype=plain(g).dtype, device=g.device)
            here[j] = 1.0
            back = self._back(source, target, g * here)
            if back is not None:
                edges[j] = (h * back).sum(-1)
        return edges.cpu()

    def _back(self, source: str, target: str, signal: Tensor) -> Tensor | None:
        """The gradient [pos, d_model] at ``source`` of a signal that starts at ``target``."""
        self.quiet = True
        try:
            (back,) = torch.autograd.grad(
                self._at[target], self._at[source], signal, retain_graph=True, allow_unused=True
            )
        finally:
            self.quiet = False
        return None if back is None else at_least_float32(plain(back))[0]

    def error(
        self, source: str, target: str, edges: Float[Tensor, "target source"]
    ) -> tuple[float, int]:
        """The largest error, relative to the largest sum of absolute terms.

        Args:
            source: The source site.
            target: The target site.
            edges: The weights to check.

        Returns:
            The error, and how many terms a sum has.
        """
        pos = len(edges)
        if source not in self._at or target not in self._gradients:
            wrong = bool((edges != 0).any())
            return (math.inf if wrong else 0.0), pos
        x, g = self._at[source], self._gradients[target]
        h = at_least_float32(x.detach())[0]
        generator = torch.Generator().manual_seed(pos)
        worst = 0.0
        for _ in range(2):
            w = torch.randn(pos, generator=generator, dtype=torch.float64)
            weights = w.to(device=g.device, dtype=plain(g).dtype)[None, :, None]
            back = self._back(source, target, g * weights)
            terms = (torch.zeros_like(h) if back is None else h * back).cpu().double()
            passed = w[:, None] * edges.double()
            difference = (terms.sum(-1) - passed.sum(0)).abs().max()
            size = (terms.abs().sum(-1) + passed.abs().sum(0)).max()
            error = float(difference / size.clamp_min(1e-30))
            worst = max(worst, error if math.isfinite(error) else math.inf)
        return worst, max(pos, x.shape[-1])

    def require(
        self,
        model: Any,
        source: str,
        target: str,
        edges: Float[Tensor, "target source"],
        watch: HookWatch,
    ) -> None:
        """Refuse edges that differ from those of autograd.

        Args:
            model: The bridge.
            source: The source site.
            target: The target site.
            edges: The weights to check.
            watch: What the user's hooks changed.

        Raises:
            UncoveredComponentError: They differ; names the transition and the hooks.
        """
        error, terms = self.error(source, target, edges)
        terms = max(terms, int(getattr(model.cfg, "d_mlp", None) or 0))
        eps = torch.finfo(torch.float32).eps
        limit = _LAYERS_OF_SUMS * eps * math.sqrt(terms)
        if is_low(model):  # the values themselves are rounded, by half an eps at each step
            limit += torch.finfo(self._at[source].dtype).eps if source in self._at else 0.0
        if error <= limit:
            return
        hooks = ", ".join(
            f"{name} at {point}" for point, names in watch.edits.items() for name in names
        )
        raise UncoveredComponentError(
            f"No graph from {source} to {target} with the hooks on this model ({hooks}): autograd "
            f"finds edges that differ by {error:.1e} of the largest sum of them, so a hook moves "
            "values between positions, or from one layer to a later one, which the edges' closed "
            "form does not account for. Relevance itself is right: use clrp.attribute or "
            "clrp.run_with_relevance, or transitions over several blocks, which come from "
            "backward signals and hold with any hook (attribution_graph(..., layers=[...]))."
        )


def _refused(model: Any, blocks: list[int], why: str) -> UncoveredComponentError:
    shown = ", ".join(f"blocks.{i}" for i in blocks[:4]) + (", ..." if len(blocks) > 4 else "")
    kind = type(model.blocks[blocks[0]].original_component).__name__
    return UncoveredComponentError(
        f"No graph of {shown} ({kind}): {why}, so tokens mix outside attention there, or in a way "
        "that the edges' closed form does not describe. Relevance itself is right: use "
        "clrp.attribute or clrp.run_with_relevance, or transitions over several blocks, which "
        "need no closed form (attribution_graph(..., layers=[...]))."
    )
