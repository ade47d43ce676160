"""Scores for input tokens that any attribution must beat, in logits where they have a unit.

- random: a draw from a normal distribution;
- recency: the position itself: later tokens first;
- gradient_x_input: the plain gradient times the embedding;
- integrated_gradients: (x − x₀) · ∫₀¹ ∇Δℓ(x₀ + a(x − x₀)) da, x₀ with the removable tokens'
  embeddings at zero (Sundararajan et al. 2017, arXiv:1703.01365), by the midpoint rule;
- occlusion: the fall of Δℓ when that token alone is removed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...hooks.placement import check_ready, check_single, own_hooks
from ...inputs.bridge import hook_points, public_name
from ...inputs.devices import precise
from ...inputs.objective import question
from ...rules.threads import frozen_parameters, one_at_a_time
from .removal import Removal, Replace, removal

BASELINES = ("random", "recency", "gradient_x_input", "integrated_gradients", "occlusion")


@one_at_a_time
def baseline_scores(
    model: Any,
    prompt: str | Tensor,
    objective: Callable[[Tensor], Tensor] | None = None,
    *,
    target: object = None,
    contrast: object = None,
    pos: int = -1,
    which: Iterable[str] = BASELINES,
    seed: int = 0,
    ig_steps: int = 32,
    replace: Replace | Tensor = "zero",
    draws: int = 4,
    exclude: Iterable[int] = (),
    include_special: bool = False,
    batch_size: int = 16,
    progress: bool = True,
    prepend_bos: bool | None = None,
) -> dict[str, Float[Tensor, " pos"]]:
    """Simple scores of a prompt's tokens, by name, for ``faithfulness_curves``.

    Args:
        model, prompt, objective, target, contrast, pos: As for ``attribute``.
        which: Of "random", "recency", "gradient_x_input", "integrated_gradients", "occlusion".
        seed: Of "random", and of random replacements.
        ig_steps: Gradients that integrated gradients average.
        replace, draws: What occlusion replaces a token with, as for ``faithfulness_curves``.
        exclude, include_special: Positions not removed; occlusion and integrated gradients give
            them 0.
        batch_size: Prompts a forward pass.
        progress: Show a bar.
        prepend_bos: Whether a text begins with the BOS token, as for ``attribute``.

    Raises:
        ValueError: an unknown name, or an argument out of range.
        TypeError, TokenError, PromptError, ModelStateError: as ``attribute``.
    """
    which = [which] if isinstance(which, str) else list(which)
    unknown = [name for name in which if name not in BASELINES]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no baseline; use some of {', '.join(BASELINES)}.")
    if ig_steps < 1:
        raise ValueError(f"ig_steps={ig_steps} must be 1 or more.")
    check_ready(model, "baseline_scores")
    check_single(model)
    objective = question(model, objective, target, contrast, pos)
    setting = removal(
        model, prompt, objective, replace=replace, draws=draws, seed=seed, exclude=exclude,
        include_special=include_special, batch_size=batch_size, progress=progress,
        prepend_bos=prepend_bos,
    )  # fmt: skip
    n = setting.tokens.shape[1]
    made: dict[str, Callable[[], Tensor]] = {
        "random": lambda: torch.randn(n, generator=torch.Generator().manual_seed(seed)),
        "recency": lambda: torch.arange(n, dtype=torch.float32),
        "gradient_x_input": lambda: _gradient_x_input(setting),
        "integrated_gradients": lambda: _integrated_gradients(setting, ig_steps),
        "occlusion": lambda: _occlusion(setting),
    }
    return {name: made[name]() for name in which}


def _occlusion(setting: Removal) -> Tensor:
    n = setting.tokens.shape[1]
    alone = torch.eye(n, dtype=torch.bool)[setting.positions]
    runs = torch.cat([torch.zeros(1, n, dtype=torch.bool), alone])
    values = setting.values(runs, "occlusion")
    scores = torch.zeros(n, dtype=torch.float64)
    scores[setting.positions] = values[0] - values[1:]
    return scores.float()


def _gradient_x_input(setting: Removal) -> Tensor:
    return _gradients(setting, torch.ones(1), torch.zeros(setting.tokens.shape[1]).bool())


def _integrated_gradients(setting: Removal, steps: int) -> Tensor:
    along = (torch.arange(steps) + 0.5) / steps
    return _gradients(setting, along, setting.removable)


def _gradients(setting: Removal, along: Tensor, moved: Tensor) -> Float[Tensor, " pos"]:
    """Σ_d x_d · mean over ``along`` of ∂Δℓ/∂x_d, at embeddings scaled by ``along`` where moved;
    positions that do not move are 0 unless none does."""
    from tqdm.auto import tqdm

    total = torch.zeros(setting.tokens.shape[1], dtype=torch.float64)
    size = setting.batch_size
    parts = [along[at : at + size] for at in range(0, len(along), size)]
    silent = not setting.progress or len(along) == 1
    for part in tqdm(parts, desc="integrated gradients", leave=False, disable=silent):
        factor = torch.where(moved, part[:, None], torch.ones(()))[..., None]
        total += _products(setting, factor) / len(along)
    return (total.masked_fill(~moved, 0.0) if bool(moved.any()) else total).float()


def _products(setting: Removal, factor: Float[Tensor, "run pos 1"]) -> Float[Tensor, " pos"]:
    """Embedding · gradient at embeddings times ``factor``, summed over runs and dimensions."""
    model, kept = setting.model, dict[str, Tensor]()

    def scaled(x: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        kept["x"] = x.detach()[:1]
        kept["leaf"] = (kept["x"] * factor.to(x)).requires_grad_(True)
        return kept["leaf"]

    name = public_name(hook_points(model), "embed.hook_out")
    with frozen_parameters(model), own_hooks(model, [(name, scaled)]):
        logits = model(setting.tokens.expand(len(factor), -1))
        value = torch.stack([setting.objective(line[None]) for line in logits]).sum()
    (gradient,) = torch.autograd.grad(value, kept["leaf"])
    product = precise(gradient) * precise(kept["x"])
    return product.sum((0, 2)).cpu()
