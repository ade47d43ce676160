"""``attribute``: explain one prediction, from one forward and one backward.

What is read is reduced inside the backward (summed over hidden dimensions), so the result needs
O(layers · pos) memory beside what autograd itself keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .attribution import Attribution, special_mask
from .backward import LEAVES, Reading, relevance_of, run
from .ledger import Ledger
from .objective import Objective, logit_diff
from .prompts import str_tokens, to_single_prompt
from .rulesets import RuleSet
from .sites import components

_SPLIT_BY_BLOCK = "blocks."


def residual_sites(model: Any) -> tuple[str, ...]:
    """HookPoints of the residual stream: every block's input, and the last block's output."""
    n = int(model.cfg.n_layers)
    return (*(f"blocks.{i}.hook_resid_pre" for i in range(n)), f"blocks.{n - 1}.hook_resid_post")


class _Sums:
    """Readings that keep sums of relevance, by name."""

    def __init__(self) -> None:
        self.readings: list[Reading] = []
        self.kept: dict[str, Tensor] = {}

    def add(self, name: str, reduce: Callable[[Tensor], Tensor], point: str | None = None) -> None:
        def sink(x: Tensor, g: Tensor) -> None:
            self.kept[name] = reduce(relevance_of(x, g)).cpu()

        def fired(x: Tensor) -> None:
            zero = torch.zeros((), dtype=torch.float32).expand(x.shape)
            self.kept[name] = reduce(zero)

        self.readings.append(Reading(point or name, sink, fired=fired))

    def add_bias(self, name: str, bias: Tensor) -> None:
        """Relevance a bias takes: bias ⊙ gradient where it was added, summed."""

        def sink(x: Tensor, g: Tensor) -> None:  # noqa: ARG001
            total = g.to(torch.promote_types(g.dtype, torch.float32)).flatten(0, 1).sum(0)
            self.kept[name] = (total.flatten() * bias.detach().to(total)).sum().cpu()

        self.readings.append(Reading(name, sink))


def _biases(model: Any) -> dict[str, Tensor]:
    """Every bias that the model adds, by the HookPoint behind it."""
    hook_dict = model.hook_dict
    found: dict[str, Tensor] = {}
    for path, component in components(model).items():
        bias = getattr(component.original_component, "bias", None)
        if isinstance(bias, Tensor) and f"{path}.hook_out" in hook_dict and bias.any():
            found[f"{path}.hook_out"] = bias
    return found


def _step_of(name: str, n_layers: int) -> int:
    """Index of the ledger row a bias belongs to: 0 embedding, 1 + block, last: after the blocks."""
    if name.startswith(_SPLIT_BY_BLOCK):
        return 1 + int(name.split(".")[1])
    return n_layers + 1


def attribute(
    model: Any,
    prompt: str | Tensor,
    objective: Callable[[Tensor], Tensor] | None = None,
    *,
    target: object = None,
    contrast: object = None,
    pos: int = -1,
    rules: str | RuleSet = "attnlrp",
    neurons: bool = False,
) -> Attribution:
    """Why did the model prefer one token over another?

    Args:
        model: A ``TransformerBridge`` in evaluation mode.
        prompt: Text, or token ids [pos] or [1, pos].
        objective: As from ``logit_diff``; or give ``target`` and ``contrast`` instead.
        target: The token the model preferred (usually wrong), as for ``logit_diff``.
        contrast: The token it should have preferred.
        pos: Position whose next token is explained, with ``target`` and ``contrast``.
        rules: Name of a rule set, or a ``RuleSet``.
        neurons: Also keep every MLP neuron's relevance at every position.

    Returns:
        An ``Attribution``: relevance in logits, positive for the target.

    Raises:
        TypeError: neither or both of an objective and a target with contrast.
        TokenError, PromptError, ModelStateError, UncoveredComponentError: see their messages.
    """
    given = objective is not None, target is not None, contrast is not None
    if given not in ((True, False, False), (False, True, True)):
        raise TypeError(
            "Give either an objective, attribute(model, prompt, clrp.logit_diff(model, ...)), or "
            "both tokens, attribute(model, prompt, target=..., contrast=...). "
            "clrp.next_token_table(model, prompt) lists candidates for the contrast."
        )
    if objective is None:
        objective = logit_diff(model, target, contrast, pos)
    tokens = to_single_prompt(model, prompt)
    n_layers = int(model.cfg.n_layers)
    sites = residual_sites(model)

    sums, biases, hook_dict = _Sums(), _biases(model), model.hook_dict
    for name in (*LEAVES, *sites):
        if name in hook_dict:
            sums.add(name, lambda r: r.sum(-1)[0])
    for layer in range(n_layers):
        sums.add(f"blocks.{layer}.attn.hook_z", lambda r: r.sum(-1)[0].T)
        if neurons:
            sums.add(f"blocks.{layer}.mlp.hook_post", lambda r: r[0])
    for name, bias in biases.items():
        sums.add_bias(name, bias)

    logits, value, coverage = run(model, tokens, objective, rules, sums.readings)

    kept = sums.kept
    resid = torch.stack([kept[name] for name in sites])
    embedded = kept[LEAVES[0]]
    positions = float(kept[LEAVES[1]].double().sum()) if LEAVES[1] in kept else 0.0
    per_step = [0.0] * (n_layers + 2)
    for name in biases:
        per_step[_step_of(name, n_layers)] += float(kept.get(name, torch.zeros(())))
    ledger = Ledger.balance(
        ("hook_embed", *sites),
        [float(row.double().sum()) for row in (embedded, *resid)],
        per_step,
        positions,
        float(value),
    )
    words = objective if isinstance(objective, Objective) else None
    target_text, contrast_text = words.texts() if words else ("", "")
    target_term, contrast_term = words.parts(logits) if words else (value[None], None)
    ids = tokens[0].cpu()
    special_ids = list(model.tokenizer.all_special_ids) if model.tokenizer is not None else []
    return Attribution(
        tokens=embedded,
        resid=resid,
        heads=torch.stack([kept[f"blocks.{i}.attn.hook_z"] for i in range(n_layers)]),
        neurons=torch.stack([kept[f"blocks.{i}.mlp.hook_post"] for i in range(n_layers)])
        if neurons
        else None,
        token_ids=ids,
        special=special_mask(ids, special_ids),
        str_tokens=str_tokens(model, ids.tolist()),
        sites=sites,
        delta=float(value),
        target_logit=float(target_term[0]),
        contrast_logit=None if contrast_term is None else float(contrast_term[0]),
        objective=str(objective) if words else getattr(objective, "__name__", repr(objective)),
        target=target_text,
        contrast=contrast_text,
        rules=coverage.rules,
        coverage=coverage,
        ledger=ledger,
        model_name=str(model.cfg.model_name),
    )
