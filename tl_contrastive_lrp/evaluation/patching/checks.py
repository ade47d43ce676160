"""What relevance patching refuses before it runs anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...inputs.bridge import hook_points
from .effects import Sweep


def check_cache(model: Any, cache: Any, sweeps: Iterable[Sweep], batch: int, pos: int) -> None:
    """Refuse a clean cache that does not fit the corrupted tokens.

    Raises:
        TypeError: no cache at all.
        ValueError: the model lacks a HookPoint, or the cache an entry, or one is not of the shape
            of these tokens' activations.
    """
    if not hasattr(cache, "__getitem__") or isinstance(cache, Tensor | tuple | list | str):
        raise TypeError(
            f"clean_cache is a {type(cache).__name__}; give the ActivationCache of the clean run: "
            "_, clean_cache = model.run_with_cache(clean_tokens)."
        )
    missing: list[str] = []
    points = hook_points(model)
    for sweep in sweeps:
        wanted = sweep.shape(model, pos)
        for layer in range(int(model.cfg.n_layers)):
            name = sweep.hook_name(layer)
            require_point(points, name)
            try:
                value = cache[name]
            except KeyError:
                missing.append(name)
                continue
            _check_shape(name, value, batch, wanted)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"clean_cache has no entry {missing[0]!r}{more}. Make it without a names_filter: "
            "_, clean_cache = model.run_with_cache(clean_tokens)."
        )


def require_point(points: Mapping[str, Any], name: str) -> None:
    """Refuse a model in which TransformerLens names no such activation.

    Raises:
        ValueError: says which.
    """
    if name not in points:
        raise ValueError(
            f"This model has no HookPoint {name!r}, so there is nothing to patch. Choose another "
            "activation; model.hook_dict lists them."
        )


def _check_shape(name: str, value: object, batch: int, wanted: tuple[int | None, ...]) -> None:
    if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
        raise ValueError(f"clean_cache[{name!r}] holds no activation but {_kind(value)}.")
    found = tuple(value.shape)
    if _fits(found, wanted):
        raise ValueError(
            f"clean_cache[{name!r}] has no batch dimension; make it without remove_batch_dim."
        )
    if not _fits(found[1:], wanted) or found[0] not in (1, batch):
        shape = ", ".join("…" if size is None else str(size) for size in (batch, *wanted))
        raise ValueError(
            f"clean_cache[{name!r}] has shape {list(found)}, but the corrupted tokens make it "
            f"[{shape}]. Clean and corrupted prompts must have the same number of tokens "
            "(and of rows, or one clean row for all), and come from the same model."
        )


def _fits(found: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(found) == len(wanted) and all(
        size in (None, at) for at, size in zip(found, wanted, strict=True)
    )


def _kind(value: object) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"{value!r:.40}"


def check_pair(clean: object, corrupt: object) -> tuple[Tensor, Tensor]:
    """Clean and corrupted tokens, both [batch, pos].

    Raises:
        ValueError: not two tensors of token ids of one shape.
    """
    for name, tokens in (("clean", clean), ("corrupt", corrupt)):
        if not isinstance(tokens, Tensor) or tokens.ndim != 2:
            found = list(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise ValueError(
                f"{name} must be token ids [batch, pos], got {found}; use model.to_tokens(text)."
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


class Watched:
    """An objective whose values are checked and kept as the backward pass calls it.

    Args:
        objective: What the user gave.
        batch: Examples of the corrupted run.
        per_example: Whether it returns [batch], one value an example, instead of a scalar.
        name: What error messages call it.
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
        value = self.objective(logits)
        wanted = (self.batch,) if self.per_example else ()
        if not isinstance(value, Tensor) or tuple(value.shape) != wanted:
            found = (
                f"shape {list(value.shape)}"
                if isinstance(value, Tensor)
                else f"a {type(value).__name__}"
            )
            how = (
                f"[{self.batch}], one value for each example, under reduce='mean' or 'none'"
                if self.per_example
                else "a scalar; return [batch] and give reduce='mean' or 'none' to keep examples "
                "apart"
            )
            raise ValueError(f"The {self.name} returned {found}; it must return {how}.")
        self.value = value.detach().to(torch.promote_types(value.dtype, torch.float32))
        return value.sum()
