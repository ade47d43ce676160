"""A value handed on unchanged through an autograd function of this package.

It is a view of what was given, which costs nothing. Autograd lets nobody write into such a view,
and what a rule has saved must stay what it was; a user's hook may edit in place wherever the model
alone would let it. So where hooks of the user's are on the model it is a copy, with the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_CONSTANT = "_tl_contrastive_lrp_constant"
_copies: ContextVar[bool] = ContextVar("tl_contrastive_lrp_copies", default=False)


@contextmanager
def writable(on: bool = True) -> Iterator[None]:
    """What is handed on inside the block may be written into, if ``on``."""
    token = _copies.set(on)
    try:
        yield
    finally:
        _copies.reset(token)


def is_writable() -> bool:
    """Whether hooks of the user's may write into what is handed on."""
    return _copies.get()


def handed_on(x: Tensor) -> Tensor:
    """``x`` for an autograd function to return: a view, or a copy inside ``writable``."""
    return x.clone() if _copies.get() else x.view_as(x)


def started(leaf: Tensor) -> Tensor:
    """A leaf as the model goes on with it: itself, or a copy inside ``writable``."""
    return leaf.clone() if _copies.get() else leaf


def constant_leaf(value: Tensor) -> Tensor:
    """A leaf for a constant that a user's hook put in the place of a computed value."""
    leaf = value.detach().requires_grad_(True)
    setattr(leaf, _CONSTANT, True)
    return leaf


def is_constant(x: Tensor) -> bool:
    """Whether ``x`` was made from such leaves alone, or from nothing that has a gradient."""
    if getattr(x, _CONSTANT, False):
        return True
    seen, left = set(), [x.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable") and not getattr(node.variable, _CONSTANT, False):
            return False
        left += [above for above, _ in node.next_functions]
    return not x.is_leaf or not x.requires_grad
