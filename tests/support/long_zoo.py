"""The zoo's families with room for long prompts, in float32 and in nothing but float64."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from truth import zoo

LENGTH = 352
WINDOWS = ("sliding_window", "window_size", "local_attention", "attention_chunk_size")
_LENGTHS = ("n_positions", "max_position_embeddings", "max_seq_len")


@contextmanager
def _long(name: str, window: int) -> Iterator[str]:
    changes = {**dict.fromkeys(_LENGTHS, 1024), **dict.fromkeys(WINDOWS, window)}
    row = zoo.ROWS[name]
    kwargs = {key: changes.get(key, value) for key, value in row.kwargs.items()}
    long = dataclasses.replace(row, name=f"{name}-long-{window}", kwargs=kwargs)
    with mock.patch.dict(zoo.ROWS, {long.name: long}):
        yield long.name


def boot(name: str, window: int, dtype: torch.dtype = torch.float32) -> Any:
    """A row of the zoo that takes 1,024 positions, with windows of this size where it has any.

    Weights do not depend on ``dtype``. Not kept for the session.
    """
    with _long(name, window) as long:
        return zoo.build.boot.__wrapped__(long, dtype)


def saved(name: str, window: int) -> Path:
    """The folder of that model."""
    with _long(name, window) as long:
        return zoo.saved(long)


def has_window(name: str) -> bool:
    return any(key in zoo.ROWS[name].kwargs for key in WINDOWS)


def _finer(asked: Any) -> Any:
    return torch.float64 if asked is torch.float32 else asked


def _keeping(original: Callable[..., Any]) -> Callable[..., Any]:
    """The function, deaf to a request for float32 where its input is float64.

    Under its own name: torch looks its functions up in their module and tells them by name.
    """

    @functools.wraps(original)
    def call(x: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(x, Tensor) and x.dtype == torch.float64:
            args = tuple(_finer(a) for a in args)
            kwargs = {key: _finer(a) for key, a in kwargs.items()}
        return original(x, *args, **kwargs)

    return call


def _float(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x: x if x.dtype == torch.float64 else original(x)


@contextmanager
def float64_throughout(model: Any) -> Iterator[None]:
    """A model in float64 that nowhere on its way rounds what it computed to float32.

    Softmaxes, norms, rotations and routers of most families do; two ways of computing then differ
    by float32's rounding however they do it. Experts run one by one: torch's grouped product has
    no float64 form.
    """
    config = model.original_model.config
    experts = "_experts_implementation_internal"
    with ExitStack() as stack:
        for owner, name in (
            (Tensor, "to"), (Tensor, "type"), (Tensor, "softmax"), (torch, "softmax"),
            (torch.nn.functional, "softmax"),
        ):  # fmt: skip
            changed = _keeping(getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, changed))
        stack.enter_context(mock.patch.object(Tensor, "float", _float(Tensor.float)))
        if getattr(config, experts, None):
            stack.enter_context(mock.patch.object(config, experts, "eager"))
        yield
