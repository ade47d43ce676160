"""Masks that transformers would make as square matrices, given by their rows instead.

Every model of transformers asks one table of functions for its attention masks, by the name of the
attention it uses; TransformerLens uses "eager". Inside ``lazy_masks``, and in the thread that
entered it alone, that function returns a ``LazyMask``, which asks transformers' own code for the
rows that are needed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..rules.visible import LazyMask

_NAME = "eager"
_lock = threading.Lock()
_entered = 0  # in all threads
_ours: Any = None  # what stands in the table meanwhile


class _Here(threading.local):
    """How often this thread is inside ``lazy_masks``."""

    depth = 0


_here = _Here()


@contextmanager
def lazy_masks() -> Iterator[None]:
    """Have this thread's forwards get lazy masks inside the ``with`` block."""
    try:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as table
        from transformers.masking_utils import sdpa_mask
    except ImportError:  # this version makes its masks otherwise
        yield
        return
    _enter(table, sdpa_mask)
    try:
        _here.depth += 1
        yield
    finally:
        _here.depth -= 1
        _leave(table)


def _enter(table: Any, visible: Callable[..., Tensor]) -> None:
    global _entered, _ours
    with _lock:
        if not _entered:
            _ours = table[_NAME] = _Masks(table[_NAME], visible)
        _entered += 1


def _leave(table: Any) -> None:
    global _entered, _ours
    with _lock:
        _entered -= 1
        if _entered:
            return
        ours, _ours = _ours, None
        if table[_NAME] is ours:
            del table[_NAME]
            if table[_NAME] is not ours.before:  # there was another one in this table
                table[_NAME] = ours.before


class _Masks:
    """The function that makes masks: lazy ones where they are wanted, else as before.

    Attributes:
        before: The function so far.
        visible: Transformers' own, which makes bool masks.
    """

    def __init__(self, before: Callable[..., Any], visible: Callable[..., Tensor]) -> None:
        self.before, self.visible = before, visible

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        known = not args and "q_length" in kwargs and not kwargs.get("use_vmap")
        if not _here.depth or not known or kwargs.get("allow_is_bidirectional_skip"):
            return self.before(*args, **kwargs)
        given = dict(kwargs)
        queries, offset = given.pop("q_length"), given.pop("q_offset", 0)
        dtype = given.pop("dtype", torch.float32)
        given["allow_is_causal_skip"] = False

        def rows(start: int, stop: int) -> Tensor:
            return self.visible(q_length=stop - start, q_offset=offset + start, **given)

        shape = (kwargs["batch_size"], 1, queries, kwargs["kv_length"])
        return LazyMask(shape, dtype, torch.device(kwargs.get("device", "cpu")), rows)
