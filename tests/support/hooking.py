"""Models to change, their forwards and gradients read from outside, hooks that fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from truth.families import fresh as fresh  # tests import it from here
from truth.families import random_tokens

import tl_contrastive_lrp as clrp

Snapshot = Callable[[Any], dict[str, Any]]


def delta(logits: Tensor) -> Tensor:
    return (logits[:, -1, 7] - logits[:, -1, 11]).sum()


def objective_of(model: Any) -> clrp.Objective:
    return clrp.logit_diff(model, 7, 11)


def off(got: Tensor, wanted: Tensor) -> float:
    """Largest error over the largest wanted entry."""
    got, wanted = got.detach(), wanted.detach()
    return float((got - wanted).abs().max() / wanted.abs().max())


def reader(kept: dict[str, Tensor], name: str) -> tuple[str, Any]:
    """A hook that lets the gradient at a HookPoint be read afterwards, from the tensor kept."""

    def hook_fn(tensor: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        out = tensor.view_as(tensor)
        out.retain_grad()
        kept[name] = out
        return out

    return name, hook_fn


def leaf(kept: dict[str, Tensor]) -> tuple[str, Any]:
    def hook_fn(tensor: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        kept["leaf"] = tensor.detach().requires_grad_(True)
        return kept["leaf"]

    return "embed.hook_out", hook_fn


def input_gradient(model: Any, ids: Tensor, fwd_hooks: list[tuple[str, Any]]) -> Tensor:
    kept: dict[str, Tensor] = {}
    with model.hooks(fwd_hooks=[leaf(kept), *fwd_hooks]):
        value = delta(model(ids))
    return torch.autograd.grad(value, kept["leaf"])[0]


def forward(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Logits and every residual-stream activation."""
    kept: dict[str, Tensor] = {}

    def keep(tensor: Tensor, hook: Any) -> None:
        kept[hook.name] = tensor.detach().clone()

    streams = [f"blocks.{i}.hook_{end}" for i in range(model.cfg.n_layers) for end in ("in", "out")]
    streams += [f"blocks.{i}.ln2.hook_in" for i in range(model.cfg.n_layers)]
    with model.hooks(fwd_hooks=[(name, keep) for name in streams]):
        kept["logits"] = model(ids).detach()
    assert len(kept) == len(streams) + 1
    return kept


def points_of(model: Any) -> list[str]:
    """One name for every HookPoint that fires."""
    fired: dict[int, str] = {}

    def note(name: str) -> tuple[str, Any]:
        def hook_fn(tensor: Any, hook: Any) -> None:  # noqa: ARG001
            fired.setdefault(id(model.hook_dict[name]), name)

        return name, hook_fn

    names = [n for n in model.hook_dict if model._gated_hook_reason(n) is None]
    with model.hooks(fwd_hooks=[note(name) for name in names]), torch.no_grad():
        model(random_tokens())
    return list(fired.values())


class UserError(Exception):
    """What a user's own hook raises."""


def fail(tensor: Any, hook: Any) -> None:  # noqa: ARG001
    raise UserError(hook.name)
