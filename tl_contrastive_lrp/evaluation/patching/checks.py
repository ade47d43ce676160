"""Checks of the arguments of relevance patching, and of the values an objective returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import a_kind
from ...inputs.bridge import hook_points
from .effects import Sweep


def check_cache(model: Any, cache: Any, sweeps: Iterable[Sweep], batch: int, pos: int) -> None:
    """Refuse a clean cache that does not fit the corrupted tokens.

    Raises:
        TypeError: The cache is not a cache.
        ValueError: The model lacks a HookPoint, the cache lacks an entry, or an entry does not have
            the shape that the corrupted tokens' activations have.
    """
    if not hasattr(cache, "__getitem__") or isinstance(cache, Tensor | tuple | list | str):
        raise TypeError(
            f"clean_cache is {a_kind(cache)}; give the ActivationCache of the clean run: "
            "_, clean_cache = model.run_with_cache(clean_tokens)."
        )
    missing: list[str] = []
    hook_dict = hook_points(model)
    for sweep in sweeps:
        expected = sweep.shape(model, pos)
        for layer in range(int(model.cfg.n_layers)):
            name = sweep.hook_name(layer)
            require_hook_point(hook_dict, name)
            try:
                value = cache[name]
            except KeyError:
                missing.append(name)
                continue
            _check_shape(name, value, batch, expected)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"clean_cache has no entry {missing[0]!r}{more}. Make it without a names_filter: "
            "_, clean_cache = model.run_with_cache(clean_tokens)."
        )


def require_hook_point(hook_dict: Mapping[str, Any], name: str) -> None:
    """Refuse a model in which TransformerLens has no HookPoint of this name.

    Raises:
        ValueError: Names the HookPoint.
    """
    if name not in hook_dict:
        raise ValueError(
            f"This model has no HookPoint {name!r}, so there is nothing to patch. Choose another "
            "activation; model.hook_dict lists them."
        )


def _check_shape(name: str, value: object, batch: int, expected: tuple[int | None, ...]) -> None:
    if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
        raise ValueError(f"clean_cache[{name!r}] holds no activation but {_describe(value)}.")
    shape = tuple(value.shape)
    if _matches(shape, expected):
        raise ValueError(
            f"clean_cache[{name!r}] has no batch dimension; make it without remove_batch_dim."
        )
    if not _matches(shape[1:], expected) or shape[0] not in (1, batch):
        sizes = ", ".join("…" if size is None else str(size) for size in (batch, *expected))
        raise ValueError(
            f"clean_cache[{name!r}] has shape {list(shape)}, but the corrupted tokens make it "
            f"[{sizes}]. Clean and corrupted prompts must have the same number of tokens "
            "(and of rows, or one clean row for all), and come from the same model."
        )


def _matches(shape: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    return len(shape) == len(expected) and all(
        size in (None, actual) for actual, size in zip(shape, expected, strict=True)
    )


def _describe(value: object) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"{value!r:.40}"


def check_pair(clean: object, corrupt: object) -> tuple[Tensor, Tensor]:
    """Return clean and corrupted tokens if both are [batch, pos] and of one shape.

    Raises:
        ValueError: They are not two tensors of token ids of one shape.
    """
    for name, tokens in (("clean", clean), ("corrupt", corrupt)):
        if not isinstance(tokens, Tensor) or tokens.ndim != 2:
            got = list(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise ValueError(
                f"{name} must be token ids [batch, pos], got {got}; use model.to_tokens(text)."
            )
    assert isinstance(clean, Tensor)
    assert isinstance(corrupt, Tensor)
    if clean.shape != corrupt.shape:
        raise ValueError(
            f"clean has shape {list(clean.shape)}, corrupt {list(corrupt.shape)}: row by row they "
            "are compared position by position, so both need as many rows and tokens. Change "
            "tokens one for one."
        )
    return clean, corrupt


class RecordedObjective:
    """An objective whose value is checked and recorded when the backward pass calls it.

    Args:
        objective: The user's function of the logits.
        batch: Number of examples in the corrupted run.
        per_example: Whether the function returns one value per example, [batch], not a scalar.
        name: Its name in error messages.

    Attributes:
        value: The most recent value, detached, in float32 or wider.

    Raises:
        TypeError: The objective is not callable.
    """

    def __init__(
        self, objective: Callable[[Tensor], Tensor], batch: int, per_example: bool, name: str
    ) -> None:
        if not callable(objective):
            raise TypeError(
                f"The {name} must be a function of the logits, as from clrp.logit_diff(...), not "
                f"{objective!r:.60}."
            )
        self.objective, self.batch = objective, batch
        self.per_example, self.name = per_example, name
        self.value: Tensor

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the objective's value, summed over the examples, and record it.

        Raises:
            ValueError: The value is not a tensor of the expected shape.
        """
        value = self.objective(logits)
        expected = (self.batch,) if self.per_example else ()
        if not isinstance(value, Tensor) or tuple(value.shape) != expected:
            got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else a_kind(value)
            advice = (
                f"[{self.batch}], one value for each example, under reduce='mean' or 'none'"
                if self.per_example
                else "a scalar; return [batch] and give reduce='mean' or 'none' to keep examples "
                "apart"
            )
            raise ValueError(f"The {self.name} returned {got}; it must return {advice}.")
        self.value = value.detach().to(torch.promote_types(value.dtype, torch.float32))
        return value.sum()
