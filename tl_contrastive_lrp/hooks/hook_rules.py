"""The rules inside the user's own hook functions, and the audit of what those compute.

A hook function is part of the model that is explained. Each call of one is examined after it has
run, on the part of the autograd graph between its argument and the value that it returned. Every
operation there must be linear in its computed inputs, piecewise linear (its own gradient is then
f(x)/x, the identity rule), or one of the rules, which are applied by operation while the function
runs, as inside wrapped modules (``by_operation/mode.py``). Any other operation is refused, with the
names of the HookPoint and the function, unless the rule set uses ordinary gradients there. Values
that the function detaches are constants by its author's decision: relevance ends there, and the
coverage report says so. A function that only observes computes nothing and adds no row.

The file is long because one call of a hook needs all of it: which tensors depend on the prompt
(``_Origin``), the rules while it runs (``_HookOperations``), the walk over its operations
(``_HookWalker``), and the record of both (``HookWatch``). ``rules_in_hooks`` combines them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import UncoveredComponentError
from ..rules import functions as rules
from ..rules.precision import plain
from ..rules.rule_sets import RuleSet
from ..rules.threads import caller, modules_of
from .audit import operations as ops
from .audit.detached import DetachedValues
from .audit.walk import UNHALVED, Info, Node, State, Unaccounted, Walker
from .by_operation import marks
from .by_operation.mode import OperationRules
from .coverage import Coverage, CoverageRow
from .user_hooks import (
    Kind,
    UserHook,
    behind,
    next_sequence,
    require_no_new,
    tensors_in,
    user_hooks,
)

# f(c·x) = c·f(x) for c > 0, piece by piece, or a constant: the ordinary gradient times x is f(x).
_PIECEWISE = ops.words("Relu LeakyRelu PreluKernel Threshold Hardshrink Abs Maximum Minimum")
# Operations that leave each number where it is in memory.
_VIEWS = ops.words("""
    Alias View UnsafeView ReshapeAlias Transpose T Permute Movedim Squeeze Unsqueeze AsStrided
    """)
_ROOTS_OF_SUMS = ("norm", "std", "vector_norm", "linalg_norm", "linalg_vector_norm")

# In-place functions that are linear, or piecewise linear, in all values written.
_WRITES = ops.words("""
    __setitem__ copy_ add_ sub_ __iadd__ __isub__ zero_ fill_ neg_ masked_fill_ index_fill_
    index_copy_ index_add_ index_put_ scatter_ scatter_add_ masked_scatter_ relu_
    """)
# Linear where only one factor is computed.
_SCALES = ops.words("mul_ multiply_ div_ divide_ true_divide_ __imul__ __itruediv__")

# Gives the HookPoint's name and the user's function; None if the hook is not a user's.
Identify = Callable[[], tuple[str, Any] | None]

_ADVICE = (
    "In the hook, give the operation a rule (clrp.rules.identity, clrp.rules.uniform; "
    "clrp.rules.ordinary(y) keeps the ordinary gradient of what made y), make its value a "
    'constant with .detach(), or ask for ordinary gradients everywhere with rules="gradient".'
)


def _is_leaf(node: Node) -> bool:
    return bool(node.name().endswith("AccumulateGrad"))


class _Origin:
    """Which tensors depend on the prompt, as seen from inside one call of a hook function.

    A gradient alone does not decide it: parameters and values computed from them have one too.

    Args:
        given: The tensors passed to the function.
        leaves: Activations without history, as from ``detach().requires_grad_()``, by id.
        begun: Autograd's sequence number when the forward began; older nodes belong to another.
    """

    def __init__(self, given: Iterable[Tensor], leaves: dict[int, Tensor], begun: int) -> None:
        self.start = next_sequence()
        self._begun = begun
        self._leaves = leaves
        self._known: dict[Node, bool] = {x.grad_fn: True for x in given if x.grad_fn is not None}

    def computed(self, tensor: Any) -> bool:
        """Whether relevance can flow through the tensor."""
        if not isinstance(tensor, Tensor) or not tensor.requires_grad:
            return False
        node = tensor.grad_fn
        return id(tensor) in self._leaves if node is None else self.of(node)

    def of(self, node: Node) -> bool:
        """Whether a node depends on the prompt."""
        known, todo = self._known, [node]
        while todo:
            last = todo[-1]
            if last not in known:
                depends = self._by_itself(last)
                below = [n for n, _ in last.next_functions if n is not None]
                if depends is None and not any(known.get(n, False) for n in below):
                    unknown = next((n for n in below if n not in known), None)
                    if unknown is not None:
                        todo.append(unknown)
                        continue
                    depends = False
                known[last] = True if depends is None else depends
            todo.pop()
        return known[node]

    def _by_itself(self, node: Node) -> bool | None:
        """Whether a node depends on the prompt, or None if that depends on the nodes below it."""
        if _is_leaf(node):
            return id(node.variable) in self._leaves
        if node._sequence_nr() < self._begun:
            return False
        return True if node.name().startswith("Embedding") else None

    def outside(self, node: Node) -> bool:
        """Whether a node was made before the function was called."""
        return _is_leaf(node) or bool(node._sequence_nr() < self.start)


class _HookOperations(OperationRules):
    """The rules by operation while a hook function runs, and a record of its in-place writes."""

    def __init__(
        self, rule_set: RuleSet, origin: _Origin, of_gradient: Callable[[Any], Any]
    ) -> None:
        super().__init__(rule_set, attention=False)
        self._origin = origin
        self._of_gradient = of_gradient  # in place of a torch hook on a tensor
        self.functions: dict[str, None] = {}  # got the identity rule
        self.linear_writes: list[tuple[int, int]] = []  # sequence numbers before and after

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, before = getattr(func, "__name__", ""), next_sequence()
        linear = name in _WRITES or (name in _SCALES and self._factors(args) < 2)
        if name == "register_hook" and len(args) == 2:
            args = (args[0], self._of_gradient(args[1]))
        if name in _ROOTS_OF_SUMS and self.rule_set.norm == "ln":
            out = func(*args, **(kwargs or {}))
            # a norm's denominator: one number for each position
            whole = isinstance(out, Tensor) and out.shape[-1:] == (1,)
            return out.detach() if whole else out
        out = super().__torch_function__(func, types, args, kwargs)
        if linear:
            self.linear_writes.append((before, next_sequence()))
        return out

    def _factors(self, args: Any) -> int:
        return sum(map(self._origin.computed, marks.tensors(args)))

    def _shared(self, out: Tensor, args: Any, rule: str) -> Tensor:
        return rules.uniform(out) if self._factors(args) > 1 and rule == "half" else out

    def weights(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Softmaxes as in wrapped modules; sigmoids as weights only if they weigh something."""
        if func.__name__ == "softplus":
            return func(*args, **kwargs)
        if func.__name__ == "softmax":
            return super().weights(func, args, kwargs)
        out = func(*args, **kwargs)  # a sigmoid counts as a weight only where it weighs something
        return marks.unsure_weight(out, constant=self.rule_set.softmax == "constant")

    def activation(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The identity rule, and a record of the functions that get it."""
        if self.ratio(func.__name__, args, kwargs) is not None:
            self.functions[func.__name__] = None
        return super().activation(func, args, kwargs)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Apply the rules inside the block."""
        self.states.append(True)
        try:
            with self:
                yield
        finally:
            self.states.pop()


class _HookWalker(Walker):
    """A walk from the value that a hook function returned to its argument."""

    def __init__(self, origin: _Origin, operations: _HookOperations) -> None:
        super().__init__(())
        self._origin = origin
        self._operations = operations
        self.piecewise: dict[Node, None] = {}

    def look(self, node: Node) -> Info:
        """The properties of a node, with only those inputs that depend on the prompt."""
        info = super().look(node)
        return info._replace(below=tuple(b for b in info.below if self._origin.of(b[1])))

    def visit(self, node: Node, info: Info, state: State) -> None:
        """As ``Walker.visit``, but ends at nodes made before the function was called."""
        if self._origin.outside(node):
            self.settle(state)
        elif info.key == "CopySlices" and self._wrote_linearly(node):
            self.go(info.below, state)
        else:
            super().visit(node, info, state)

    def nonlinear(self, node: Node, info: Info, state: State) -> None:
        """As ``Walker.nonlinear``, but piecewise linear operations have their rule."""
        if info.key in _PIECEWISE:
            self.settle(state)
            self.piecewise[node] = None
            self.go(info.below, State(weight=state.weight))
        else:
            super().nonlinear(node, info, state)

    def _wrote_linearly(self, node: Node) -> bool:
        number = node._sequence_nr()
        writes = self._operations.linear_writes
        return any(before <= number < after for before, after in writes)

    @property
    def only_moves(self) -> bool:
        """Whether no operation changed a number."""
        infos = self.infos.items()
        return all(i.key in _VIEWS for node, i in infos if not self._origin.outside(node))


def _may_keep_gradient(unruled: Unaccounted, info: Info, rule_set: RuleSet) -> bool:
    """Whether the rule set itself keeps the ordinary gradient of this operation."""
    if unruled.why == UNHALVED:
        return rule_set.gate == "gradient"
    if info.key in ops.NORMS:
        return rule_set.norm == "gradient"
    if info.key in ops.ACTIVATIONS:
        return rule_set.activation == "gradient"
    kinds = (rule_set.norm, rule_set.activation, rule_set.gate, rule_set.qk, rule_set.pattern_v)
    return set(kinds) == {"gradient"} and rule_set.softmax == "gradient"


def name_of(function: Any) -> str:
    """The name of a hook function, which may be a ``functools.partial`` or an object."""
    function = getattr(function, "func", function)
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    return str(name).rpartition("<locals>.")[2]


@dataclass(eq=False)
class HookWatch:
    """What the user's hook functions did in the forwards inside a ``rules_in_hooks`` block.

    Attributes:
        edits: Names of hook functions that did more than observe, by HookPoint or module.
        rows: Their operations, for the coverage report.
        quiet: Whether the backward that runs is not the model's own; backward hooks that have only
            observed so far are then not called.
        of_backward: Whether any hook is called in the backward.
    """

    edits: dict[str, dict[str, None]] = field(default_factory=dict)
    rows: dict[CoverageRow, None] = field(default_factory=dict)
    quiet: Callable[[], bool] = lambda: False
    of_backward: bool = False
    _rule_set: RuleSet = field(init=False)
    _report: Coverage | None = field(init=False)
    _begun: int = field(init=False)
    _caller: object = field(init=False)  # the thread whose forwards are watched
    _leaves: dict[int, Tensor] = field(default_factory=dict)

    def begin(self, rule_set: RuleSet, report: Coverage | None) -> None:
        """Watch forwards from here on; older autograd nodes belong to other forwards."""
        self._rule_set, self._report, self._begun = rule_set, report, next_sequence()
        self._caller = caller()

    def edited(self, prefix: str) -> bool:
        """Whether a hook function edited something below a name that begins so."""
        return any(f"{name}.".startswith(prefix) for name in self.edits)

    def watching(self, fn: Callable[..., Any], kind: Kind, identify: Identify) -> Any:
        """A torch hook that replaces ``fn``, calls it and examines what it does.

        Args:
            fn: The function in torch's table.
            kind: Which of torch's tables that is.
            identify: Gives the HookPoint's name and the user's function; None if it is not a
                user's.
        """
        if kind in ("backward", "backward_pre"):
            return self._watching_gradient(fn, identify)

        def watched(module: Any, *args: Any) -> Any:
            if caller() is not self._caller or not torch.is_grad_enabled():
                return fn(module, *args)
            who = identify()
            if who is None:
                return fn(module, *args)
            value = args[-1] if kind == "forward" or len(args) == 1 else args
            return self._call(*who, lambda: fn(module, *args), value, tensors_in(args))

        return watched

    def _watching_gradient(self, fn: Callable[..., Any], identify: Identify) -> Any:
        """A hook that replaces a function which receives gradients and may return others."""
        self.of_backward = True
        state = {"edits": False}

        def watched(*args: Any) -> Any:
            if self.quiet() and not state["edits"]:
                return None
            given = tensors_in(args[-1])
            before = [(x, _version(x)) for x in given]
            returned, who = fn(*args), identify()
            if who is None:
                return returned
            after = given if returned is None else tensors_in(returned)
            if not _same_values(after, given) or any(_version(x) != v for x, v in before):
                state["edits"] = True
                point, user = who
                self.edits.setdefault(point, {})[name_of(user)] = None
                how = "changed in the backward"
                self._add([_row(point, user, "gradient", "the hook's own", how)])
            return returned

        return watched

    def _add(self, rows: list[CoverageRow]) -> None:
        self.rows.update(dict.fromkeys(rows))
        if self._report is not None:
            self._report.add(rows)

    def _call(
        self, point: str, user: Any, run: Callable[[], Any], output: Any, shown: list[Tensor]
    ) -> Any:
        given = tensors_in(output)
        # The tensors are kept alive, so that their ids are not reused.
        self._leaves.update({id(x): x for x in shown if x.requires_grad and x.grad_fn is None})
        versions = [_version(x) for x in shown]
        origin = _Origin(given, self._leaves, self._begun)
        was_computed = any(map(origin.computed, given))

        def of_gradient(fn: Any) -> Any:
            return self._watching_gradient(fn, lambda: (point, user))

        operations = _HookOperations(self._rule_set, origin, of_gradient)
        detached = DetachedValues(lambda: None, origin.computed)
        with operations.on(), detached:
            returned = run()
        after = tensors_in(output if returned is None else returned)
        touched = versions != [_version(x) for x in shown]
        if not touched and len(after) == len(given) and all(map(_is, after, given)):
            return returned
        walker = _HookWalker(origin, operations)
        for tensor in after:
            if tensor.grad_fn is not None and origin.computed(tensor):
                walker.run(tensor.grad_fn)
        if not touched and walker.only_moves and _same_places(after, given):
            return returned
        self.edits.setdefault(point, {})[name_of(user)] = None
        still_computed = any(map(origin.computed, after))
        self._require_rules(point, user, walker)
        self._report_rows(point, user, walker, operations, detached, was_computed, still_computed)
        return returned

    def _require_rules(self, point: str, user: Any, walker: _HookWalker) -> None:
        """Refuse operations without a rule."""
        refused = [
            operation
            for operation in walker.findings.values()
            if not _may_keep_gradient(operation, walker.infos[operation.node], self._rule_set)
        ]
        if refused:
            lines = dict.fromkeys(f"  {f.operation}: {f.why}." for f in refused)
            raise UncoveredComponentError(
                f"No rule covers what the hook function {name_of(user)} at {point} computes, so "
                "relevance through it would be made up:\n" + "\n".join(lines) + f"\n{_ADVICE}"
            )

    def _report_rows(
        self,
        point: str,
        user: Any,
        walker: _HookWalker,
        operations: _HookOperations,
        detached: DetachedValues,
        was_computed: bool,
        still_computed: bool,
    ) -> None:
        """Add rows to the report."""
        rows: dict[tuple[str, str, str], None] = {}
        infos = walker.infos
        for node in walker.piecewise:
            rows[infos[node].operation.lower(), "identity", "its own gradient is f(x)/x"] = None
        for info in infos.values():
            if info.rule is not None and info.operation in _BY_RULE:
                operation, rule = _BY_RULE[info.operation]
                if rule == "identity" and operations.functions:
                    operation = ", ".join(operations.functions)
                rows[operation, rule, "by operation inside the hook"] = None
        for node in walker.ordinary:
            rows[infos[node].operation.lower(), "gradient", "ordinary gradient"] = None
        for unruled in walker.findings.values():
            operation = "product" if unruled.why == UNHALVED else unruled.operation.lower()
            rows[operation, "gradient", "ordinary gradient, as the rule set says"] = None
        for cut in detached.cuts:
            rows[cut.operation, "constant", "detached in the hook: relevance ends here"] = None
        if not still_computed:
            where = "relevance ends here" if was_computed else "before relevance begins"
            rows["replacement", "constant", where] = None
        elif not any(rule != "constant" for _, rule, _ in rows):
            rows["linear", "gradient", "ordinary gradient, which is exact"] = None
        self._add([_row(point, user, what, rule, how) for what, rule, how in rows])


def _row(point: str, user: Any, operation: str, rule: str, attached: str) -> CoverageRow:
    return CoverageRow(point, f"user hook {name_of(user)}", operation, rule, attached)


_BY_RULE = {
    "ScaleGradient": ("product", "half"),
    "GatedProduct": ("gated product", "identity"),
    "Ratio": ("activation", "identity"),
    "LinearNorm": ("norm", "ln"),
    "Normalized": ("norm", "ln"),
    "SoftmaxTemperature": ("softmax", "temperature"),
}


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _is(a: Any, b: Any) -> bool:
    return a is b


def _same_places(after: list[Tensor], given: list[Tensor]) -> bool:
    """Whether the tensors share the same memory and have the same shapes."""
    return len(after) == len(given) and all(
        x.data_ptr() == y.data_ptr()
        and x.shape == y.shape
        and x.stride() == y.stride()
        and x.requires_grad == y.requires_grad
        for x, y in zip(after, given, strict=True)
    )


def _same_values(after: list[Tensor], given: list[Tensor]) -> bool:
    """Whether gradients have the same values; False if that cannot be determined."""
    try:
        return len(after) == len(given) and all(
            x is y or torch.equal(plain(x), plain(y)) for x, y in zip(after, given, strict=True)
        )
    except RuntimeError:  # several signals at once, in a vectorised backward
        return False


def rows_to_come(model: Any) -> list[CoverageRow]:
    """A row for each of the user's hook functions, before any has run."""
    hooks = user_hooks(model)
    return list(
        dict.fromkeys(_row(hook.name, hook.fn, "?", "?", "seen when it runs") for hook in hooks)
    )


@contextmanager
def rules_in_hooks(
    model: Any,
    rule_set: RuleSet,
    report: Coverage | None = None,
    *,
    hooks: tuple[UserHook, ...] | None = None,
    later: bool = False,
    watch: HookWatch | None = None,
) -> Iterator[HookWatch]:
    """The rules inside the user's hook functions, for the block.

    Args:
        model: The bridge.
        rule_set: Which rules.
        report: The coverage report, to which rows are added as hook functions run.
        hooks: ``user_hooks(model)``, if the caller has them already.
        later: Whether hooks may be added inside the block; those get the rules, too.
        watch: Records what the hooks do; a new one by default.

    Raises:
        UncoveredComponentError: Inside the block, when a hook function has computed something
            without a rule.
        ModelStateError: At its end, if hooks were added.
    """
    watch = HookWatch() if watch is None else watch
    watch.begin(rule_set, report)
    hooks = user_hooks(model) if hooks is None else hooks
    replaced: list[tuple[Any, int, Any]] = []

    def put(table: Any, key: int, kind: Kind, identify: Identify) -> None:
        replaced.append((table, key, table[key]))
        table[key] = watch.watching(table[key], kind, identify)

    modules = modules_of(model) if later else ()
    try:
        for hook in hooks:
            put(hook.table, hook.key, hook.kind, partial(_name_and_function, hook))
        for module in modules:
            for kind, name in _REGISTER.items():
                vars(module)[name] = _registering(module, kind, name, put)
        yield watch
    finally:
        for module in modules:
            for name in _REGISTER.values():
                vars(module).pop(name, None)
        for table, key, fn in reversed(replaced):
            if key in table:  # else it was removed inside
                table[key] = fn
    if hooks and not later:
        require_no_new(model, hooks)


_REGISTER: dict[Kind, str] = {
    "forward": "register_forward_hook",
    "forward_pre": "register_forward_pre_hook",
}


def _name_and_function(hook: UserHook) -> tuple[str, Any]:
    return hook.name, hook.fn


def _registering(
    module: Any, kind: Kind, name: str, put: Callable[..., None]
) -> Callable[..., Any]:
    """A replacement for a module's method that registers hooks, so that these are watched."""

    def register(*args: Any, **kwargs: Any) -> Any:
        handle = getattr(type(module), name)(module, *args, **kwargs)
        table = vars(module)[f"_{kind}_hooks"]
        registered = table[handle.id]

        def identify() -> tuple[str, Any] | None:
            user = behind(module, handle.id, registered)
            place = getattr(module, "name", None) or type(module).__name__
            return None if user is None else (str(place), user)

        put(table, handle.id, kind, identify)
        return handle

    return register
