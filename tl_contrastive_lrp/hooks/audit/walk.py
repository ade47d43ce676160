"""Following the autograd graph from the logits down to the embeddings, one node at a time.

Relevance is activation × gradient, so all of it flows through this graph and nowhere else. With the
rules on and the parameters frozen, every node visited is linear in its computed inputs, or one of
this package's rules, or reported as a finding. Each product of two computed factors must come
directly below a halving, and each halving directly above a product.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...inputs.devices import precise
from ...rules.functions import RuleNode
from . import operations as ops

Node = Any  # torch.autograd.graph.Node, and the context objects of Python Functions


class Unaccounted(NamedTuple):
    """An operation that no rule accounts for: its node, its name, and why."""

    node: Node
    operation: str
    why: str


@dataclass(frozen=True)
class Walk:
    """The result of a walk.

    Attributes:
        findings: The operations that no rule accounts for, from the logits down.
        ordinary: Nonlinear nodes that keep their ordinary gradient because that is their rule.
        counts: Number of nodes by operation.
        leaves: How many of the leaves were reached.
    """

    findings: tuple[Unaccounted, ...]
    ordinary: tuple[Unaccounted, ...]
    counts: dict[str, int]
    leaves: int


class State(NamedTuple):
    """What the path to a node requires of it.

    Attributes:
        halved: The halving whose product has not been reached yet.
        ordinary: Whether the next nonlinear operation keeps its ordinary gradient by decision.
        weight: Whether the value is a factor: the path has a product, and no mixing below it.
    """

    halved: Node | None = None
    ordinary: bool = False
    weight: bool = False


_FRESH = State()
_WEIGHT = State(weight=True)

UNHALVED = (
    "it multiplies two computed tensors, and no uniform (half) rule divides the relevance "
    "between them"
)
_STRAY = "its gradient is halved here, but no product of two computed tensors follows"
_TWICE = "its gradient is halved twice for one product"
_UNKNOWN = "the audit does not know this operation, so it cannot vouch for its gradient"
_FUSED = (
    "fused attention computes two products and a softmax where no rule reaches; load the model "
    'with attn_implementation="eager"'
)
_OVERWRITTEN = "part of a tensor is changed in place by an operation that autograd does not show"
_OTHER_LEAF = "a tensor besides the embeddings requires a gradient and would absorb relevance"
_SCALED = "its gradient is scaled by something other than a half"


class Info(NamedTuple):
    """Properties of a node that do not depend on the path to it."""

    operation: str
    key: str  # as in the tables, "" for Python Functions
    rule: RuleNode | None
    below: tuple[tuple[int, Node], ...]  # computed inputs with their positions


_NAMES: dict[str, tuple[str, str]] = {}


def _parsed(name: str) -> tuple[str, str]:
    """("Mul", "Mul0") from "MulBackward0"; the tables may list either."""
    if name not in _NAMES:
        bare = name.rpartition("::")[2]
        match = re.fullmatch(r"(.+?)Backwards?(\d*)", bare)
        _NAMES[name] = (match[1], match[1] + match[2]) if match else (bare, bare)
    return _NAMES[name]


def _info(node: Node) -> Info:
    below = tuple((i, n) for i, (n, _) in enumerate(node.next_functions) if n is not None)
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        function = node._forward_cls  # type: ignore[attr-defined]
        rule = ops.rule_node(function)
        return Info(function.__qualname__.lstrip("_"), "", rule, below)
    stem, full = _parsed(node.name())
    exact = full if full in ops.NONLINEAR else stem
    return Info(stem, exact, None, below)


def walk_graph(logits: Tensor, leaves: Iterable[Tensor]) -> Walk:
    """Follow every path from ``logits`` to ``leaves``.

    Args:
        logits: What relevance starts from, computed with the rules on and parameters frozen.
        leaves: The tensors it ends at, such as the embeddings [batch, pos, d_model].
    """
    walker = Walker({id(leaf) for leaf in leaves})
    walker.run(logits.grad_fn)
    counts = Counter(info.operation for info in walker.infos.values())
    ordinary = tuple(
        Unaccounted(node, walker.infos[node].operation, "") for node in walker.ordinary
    )
    return Walk(tuple(walker.findings.values()), ordinary, dict(counts), len(walker.reached))


class Walker:
    """One walk over the graph."""

    def __init__(self, leaves: Collection[int]) -> None:
        self.leaves = leaves
        self.reached: set[int] = set()
        self.infos: dict[Node, Info] = {}  # holds the nodes, so that their ids are not reused
        self.findings: dict[tuple[Node, str], Unaccounted] = {}
        self.ordinary: dict[Node, None] = {}
        self.todo: list[tuple[Node, State]] = []

    def run(self, root: Node | None) -> None:
        """Visit every node that can be reached from ``root``."""
        seen: set[tuple[Node, State]] = set()
        if root is not None:
            self.todo.append((root, _FRESH))
        while self.todo:
            step = self.todo.pop()
            if step in seen:
                continue
            seen.add(step)
            node, state = step
            info = self.infos.get(node)
            if info is None:
                info = self.infos[node] = self.look(node)
            self.visit(node, info, state)

    def look(self, node: Node) -> Info:
        """The properties of a node."""
        return _info(node)

    def _find(self, node: Node, why: str) -> None:
        info = self.infos[node]
        operation = "halving" if info.rule and info.rule.effect == "halve" else info.operation
        self.findings.setdefault((node, why), Unaccounted(node, operation, why))

    def settle(self, state: State) -> None:
        """Report a halving that is not followed by its product."""
        if state.halved is not None:
            self._find(state.halved, _STRAY)

    def go(self, below: Iterable[tuple[int, Node]], state: State) -> None:
        """Visit these nodes later."""
        self.todo.extend((node, state) for _, node in below)

    def visit(self, node: Node, info: Info, state: State) -> None:
        """Classify a node that was reached by a path with this ``state``, and continue below it."""
        key = info.key
        if info.rule is not None:
            self._rule(node, info, info.rule, state)
        elif key in ops.LINEAR or key in ops.SELECTING:
            self.go(info.below, state)
        elif key in ops.PRODUCTS:
            self._product(node, info, state)
        elif key in ops.SOFTMAXES:
            self.settle(state)
            self.ordinary[node] = None
            self.go(info.below, _FRESH)
        elif key == "AccumulateGrad":
            self._leaf(node, state)
        elif key == "CopySlices":
            if not _only_copies(node):
                self._find(node, _OVERWRITTEN)
            self.go(info.below, state)
        elif key == "Div" and all(position == 0 for position, _ in info.below):
            self.go(info.below, state)
        else:
            self.nonlinear(node, info, state)

    def nonlinear(self, node: Node, info: Info, state: State) -> None:
        """Classify a node that is in none of the linear tables."""
        self.settle(state)
        by_decision = state.ordinary or (info.key in ops.GATES and state.weight)
        if info.key.startswith(ops.FUSED_ATTENTION):
            self._find(node, _FUSED)
        elif info.key not in ops.NONLINEAR:
            self._find(node, _UNKNOWN)
        elif by_decision:
            self.ordinary[node] = None
        else:
            self._find(node, ops.NONLINEAR[info.key])
        self.go(info.below, State(weight=state.weight))

    def _product(self, node: Node, info: Info, state: State) -> None:
        positions = ops.PRODUCTS[info.key]
        factors = [step for step in info.below if step[0] in positions]
        addends = [step for step in info.below if step[0] not in positions]
        if len(factors) > 1:
            if state.halved is None:
                self._find(node, UNHALVED)
            self.go(factors, _WEIGHT)
        elif info.key not in ops.MIXING:
            self.go(factors, state)
        elif factors:
            self.settle(state)
            self.go(factors, _FRESH)
        self.go(addends, state)

    def _rule(self, node: Node, info: Info, rule: RuleNode, state: State) -> None:
        below = [step for step in info.below if step[0] in rule.follow]
        if rule.effect == "halve":
            if state.halved is not None:
                self._find(node, _TWICE)
            if getattr(node, "factor", None) != 0.5:
                self._find(node, _SCALED)
            self.go(below, state._replace(halved=node))
        elif rule.effect == "product":
            if state.halved is None:
                self._find(node, UNHALVED)
            self.go(below, _FRESH)
        elif rule.effect == "norm":
            self.settle(state)
            self.go(below, _FRESH)
        else:
            self.go(below, state._replace(ordinary=state.ordinary or rule.effect == "ordinary"))

    def _leaf(self, node: Node, state: State) -> None:
        self.settle(state)
        if id(node.variable) in self.leaves:
            self.reached.add(id(node.variable))
        else:
            self._find(node, _OTHER_LEAF)


def _only_copies(node: Node) -> bool:
    """Whether an in-place change of a slice only copied or added values there.

    Autograd hides the operation, but not what its backward does. For a copy, the rest of the tensor
    gets its gradient unchanged, and the values written or added get the slice's gradient.
    """
    try:
        (meta,) = node._input_metadata
        n = int(torch.Size(meta.shape).numel())
        numbers = torch.arange(n, device=meta.device) % 199 + 1  # exact in every float type
        g = numbers.reshape(meta.shape).to(meta.dtype)
        with torch.no_grad():
            sent = node(g)
    except (RuntimeError, AttributeError, TypeError, ValueError):
        return False
    base, *rest = sent if isinstance(sent, tuple) else (sent,)
    g = precise(g)
    written = [precise(s) for s in rest if s is not None]
    if not written:
        return False
    copies = all(bool(torch.isin(s.abs(), g).all()) for s in written)
    if base is None:  # written into a constant
        return copies
    base = precise(base)
    unchanged = base == g
    if bool(unchanged.all()):  # added
        return copies
    copied = bool(sum(s.sum() for s in written) == g[~unchanged].sum())
    return copied and bool((unchanged | (base == 0)).all())
