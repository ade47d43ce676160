"""How the operands of every computation lie in memory.

Kernels choose the order in which they add up by shapes, strides and the alignment of their
operands, so two computations have the same bits on every processor if the same operations get the
same values that lie in memory alike; that much can be seen on any one processor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ALIGNMENT = 64  # bytes: what torch allocates on a CPU starts at a multiple of it

# What only moves or compares, and what rounds each element once, whatever else lies where.
ORDERLESS = {
    "_local_scalar_dense", "_to_copy", "_unsafe_view", "abs", "add", "add_", "alias", "arange",
    "bernoulli", "bitwise_and", "bitwise_not", "bitwise_or", "cat", "clone", "copy_", "detach",
    "div", "empty", "empty_like", "eq", "expand", "fill_", "full", "full_like", "ge", "gt", "le",
    "logical_and", "lt", "masked_fill", "mul", "mul_", "ne", "neg", "new_zeros", "ones", "permute",
    "select", "slice", "split", "sqrt", "squeeze", "stack", "sub", "t", "transpose", "unsqueeze",
    "view", "zero_", "zeros", "zeros_like",
}  # fmt: skip

Call = tuple[str, tuple[Any, ...]]


def _lies(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return repr(x) if isinstance(x, int | float | bool | str | None) else type(x).__name__
    return str(x.dtype), tuple(x.shape), x.stride(), x.data_ptr() % ALIGNMENT


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in ORDERLESS:
            self.calls.append((name, tuple(map(_lies, tree_leaves((args, kwargs or {}))))))
        return func(*args, **(kwargs or {}))


@contextmanager
def layouts() -> Iterator[list[Call]]:
    """Yields, in order, the operations whose rounding may hang on layouts, each with these."""
    with _Recorder() as recorder:
        yield recorder.calls


def is_within(calls: list[Call], others: list[Call]) -> bool:
    """Whether ``others`` has all ``calls`` in their order, perhaps with more between them."""
    left = iter(others)
    return all(any(call == other for other in left) for call in calls)
