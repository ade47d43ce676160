"""Scores for input tokens that any attribution should beat, in logits where they have a unit.

- random: draws from a normal distribution.
- recency: the position itself, so later tokens come first.
- gradient_x_input: the plain gradient times the embedding.
- integrated_gradients: (x − x₀) · ∫₀¹ ∇Δℓ(x₀ + a(x − x₀)) da, where x₀ has the removable tokens'
  embeddings at zero (Sundararajan et al. 2017, arXiv:1703.01365), by the midpoint rule.
- occlusion: the fall of Δℓ when that token alone is removed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from einops import reduce
from jaxtyping import Bool, Float
from torch import Tensor

from ...hooks.placement import check_ready, check_single, embedding_leaves, own_hooks
from ...inputs.bridge import LEAVES
from ...inputs.devices import precise
from ...inputs.objective import question
from ...rules.threads import frozen_parameters, one_at_a_time
from .removal import Removal, Replace, prepare_removal

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
    """Score a prompt's tokens by simple methods, for comparison in ``faithfulness_curves``.

    Args:
        model: A ``TransformerBridge`` in evaluation mode.
        prompt: Text, or token ids [pos] or [1, pos].
        objective: Maps logits to Δℓ, as for ``attribute``.
        target: The objective's target token, if no ``objective`` is given.
        contrast: The objective's contrast token, if no ``objective`` is given.
        pos: The objective's position, if no ``objective`` is given.
        which: Names among "random", "recency", "gradient_x_input", "integrated_gradients"
            (arXiv:1703.01365) and "occlusion".
        seed: Seed for "random" and for random replacements.
        ig_steps: Number of gradients that integrated gradients averages.
        replace: What occlusion replaces a token with, as for ``faithfulness_curves``.
        draws: Number of random replacements, as for ``faithfulness_curves``.
        exclude: Positions that are never removed. Occlusion and integrated gradients score them 0.
        include_special: Whether special tokens and the first token can be removed. If not,
            occlusion and integrated gradients score them 0.
        batch_size: Prompts per forward pass.
        progress: Whether to show a progress bar.
        prepend_bos: Whether a text begins with the BOS token, as for ``attribute``.

    Returns:
        Scores [pos] by name. Gradients and occlusion are in logits, and positive where the token
        supports the target.

    Raises:
        ValueError: A name is unknown, or an argument is out of range.
        TypeError, TokenError, PromptError, ModelStateError: As for ``attribute``.

    Example:
        >>> scores = clrp.baseline_scores(model, case.prompt, objective, which=["gradient_x_input"])
        >>> scores["gradient_x_input"].shape == result.tokens.shape
        True
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
    setting = prepare_removal(
        model, prompt, objective, replace=replace, draws=draws, seed=seed, exclude=exclude,
        include_special=include_special, batch_size=batch_size, progress=progress,
        prepend_bos=prepend_bos,
    )  # fmt: skip
    n = setting.tokens.shape[1]
    methods: dict[str, Callable[[], Tensor]] = {
        "random": lambda: torch.randn(n, generator=torch.Generator().manual_seed(seed)),
        "recency": lambda: torch.arange(n, dtype=torch.float32),
        "gradient_x_input": lambda: _gradient_x_input(setting),
        "integrated_gradients": lambda: _integrated_gradients(setting, ig_steps),
        "occlusion": lambda: _occlusion(setting),
    }
    return {name: methods[name]() for name in which}


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
    scales = (torch.arange(steps) + 0.5) / steps
    return _gradients(setting, scales, setting.removable)


def _gradients(
    setting: Removal, scales: Float[Tensor, " step"], scaled: Bool[Tensor, " pos"]
) -> Float[Tensor, " pos"]:
    """Return Σ_d x_d · ∂Δℓ/∂x_d, the gradient averaged over embeddings of different scales.

    Args:
        setting: The prompt and its objective.
        scales: The factors by which embeddings are multiplied.
        scaled: Positions whose embeddings are multiplied. Other positions score 0, unless no
            position is scaled.
    """
    from tqdm.auto import tqdm

    total = torch.zeros(setting.tokens.shape[1], dtype=torch.float64)
    size = setting.batch_size
    batches = [scales[start : start + size] for start in range(0, len(scales), size)]
    silent = not setting.progress or len(scales) == 1
    for batch in tqdm(batches, desc="integrated gradients", leave=False, disable=silent):
        factor = torch.where(scaled, batch[:, None], torch.ones(()))[..., None]
        total += _products(setting, factor) / len(scales)
    return (total.masked_fill(~scaled, 0.0) if bool(scaled.any()) else total).float()


def _products(setting: Removal, factor: Float[Tensor, "run pos 1"]) -> Float[Tensor, " pos"]:
    """Return embedding · gradient at embeddings times ``factor``, summed over runs."""
    model = setting.model
    embeddings: list[Tensor] = []
    leaves: dict[str, Tensor] = {}

    def scale(embedding: Tensor) -> Tensor:
        embeddings.append(embedding[:1])
        return embedding[:1] * factor.to(embedding)

    hooks = embedding_leaves(model, leaves, scale, LEAVES[:1])
    with frozen_parameters(model), own_hooks(model, hooks):
        logits = model(setting.tokens.expand(len(factor), -1))
        value = torch.stack([setting.objective(row[None]) for row in logits]).sum()
    (gradient,) = torch.autograd.grad(value, leaves[LEAVES[0]])
    product = precise(gradient) * precise(embeddings[0])
    return reduce(product, "run pos d_model -> pos", "sum").cpu()
