"""Values that a model computes from its input and then hides from autograd.

``detach``, ``.data`` and ``no_grad`` leave no node behind, so the graph cannot show them: relevance
would silently miss that part. A ``TorchFunctionMode`` sees every torch operation of the forward: it
follows each floating-point value that depends on the input but carries no gradient, and reports it
once it is used in the rest of the computation. Indices and masks (integers, booleans) are constants
under every rule; values that this package itself detaches belong to a rule.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Cut(NamedTuple):
    """The module in which a value was detached, and the operation that did it."""

    module: nn.Module | None
    operation: str


# Functions that take shape, type or device from their arguments, never a value.
_VALUE_FREE = frozenset(
    {"requires_grad_", "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"}
    | {f"{kind}_like" for kind in ("zeros", "ones", "empty", "full", "rand", "randn")}
)
_READABLE = {"__get__": "data"}
_PACKAGE = __name__.partition(".")[0]
# Frames between a function and its caller: torch's own modes, and checkers of arguments in tests.
_PASSED_OVER = ("torch.", "einops.", "jaxtyping.", "beartype.", __name__)
_FIRST_ONLY = frozenset({"to", "type_as", "expand_as", "view_as", "reshape_as"})


class DetachedValues(TorchFunctionMode):
    """Follows cut-off values while it is active; ``cuts`` lists those that were used.

    Args:
        at_work: Returns the module whose forward is running.
        computed: Whether a tensor carries a gradient to the input. By default any gradient counts,
            which is right where parameters are frozen.
    """

    def __init__(
        self,
        at_work: Callable[[], nn.Module | None],
        computed: Callable[[Tensor], bool] | None = None,
    ) -> None:
        super().__init__()
        self._computed = computed or (lambda x: x.requires_grad)
        self.cuts: dict[Cut, None] = {}
        self._at_work = at_work
        self._cut: dict[int, tuple[Tensor, Cut]] = {}  # holds the tensors, so ids are not reused

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        takes = args[:1] if name in _FIRST_ONLY else (*args, *kwargs.values())
        inputs = [] if name in _VALUE_FREE else _tensors(takes)
        computed = any(self._computed(x) for x in inputs)
        # A tensor that carries a gradient by now is the result of an autograd Function.
        hidden = [x for x in inputs if not x.requires_grad]
        known = [self._cut[id(x)][1] for x in hidden if id(x) in self._cut]
        out = func(*args, **kwargs)
        if computed or known:
            # In-place operations, assignment to a slice among them, change their first argument.
            changed = (out, args[0]) if name.endswith("_") and args else (out,)
            self._follow(name, known, [y for y in _tensors(changed) if y.is_floating_point()])
        return out

    def _follow(self, name: str, known: list[Cut], outputs: list[Tensor]) -> None:
        hidden = [y for y in outputs if not y.requires_grad]
        if len(hidden) < len(outputs) and known and not _is_ours():
            self.cuts.update(dict.fromkeys(known))
        if hidden and (known or not _is_ours()):
            cut = (
                known[0] if known else Cut(self._at_work(), _READABLE.get(name) or name.strip("_"))
            )
            self._cut.update({id(y): (y, cut) for y in hidden})


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among these values and in lists and tuples of them, in their order."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += _tensors(value)
    return found


def _is_ours() -> bool:
    """Whether this package's code, not the model's, made the call."""
    frame = sys._getframe(3)
    while frame is not None:
        room = frame.f_globals.get("__name__", "")
        if not room.startswith(_PASSED_OVER):
            return str(room).partition(".")[0] == _PACKAGE
        frame = frame.f_back  # type: ignore[assignment]
    return False
