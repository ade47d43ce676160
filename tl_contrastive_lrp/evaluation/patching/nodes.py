"""``relevance_patch``: TransformerLens' ``attribution_patch`` on relevance instead of gradients.

It returns TransformerLens' own ``AttributionResult``, keyed by its own ``Node``, so every function
that takes one (``faithfulness``, for instance, takes ``top_edges``) takes this one too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.tools.analysis.attribution_patching import (
    AttributionResult,
    EdgeAttributionConfig,
    Node,
)

from ...engine.plain import run
from ...engine.reading import Reading
from ...hooks.attach import HookFn
from ...hooks.placement import check_ready, own_hooks
from ...inputs.bridge import hook_points, public_name
from ...inputs.tokens import to_tokens
from ...rules.functions import at_least_float32
from ...rules.rule_sets import RuleSet, get_rule_set
from ...rules.threads import one_at_a_time
from .checks import RecordedObjective, check_pair, require_hook_point
from .edges import EdgeReader, check_additive
from .estimates import PATCHING_RULES


def writer_names(n_layers: int) -> list[str]:
    """Return the HookPoints of all writers to the residual stream (of heads, before W_O)."""
    layers = (
        name
        for i in range(n_layers)
        for name in (f"blocks.{i}.attn.hook_z", f"blocks.{i}.hook_mlp_out")
    )
    return ["hook_embed", *layers]


def _enumerate_nodes(n_layers: int, n_heads: int, n_pos: int) -> Iterator[tuple[Node, int, int]]:
    """Yield (node, position, index of its writer), in TransformerLens' order."""
    for pos in range(n_pos):
        yield Node("embed", pos), pos, 0
    for layer in range(n_layers):
        first = 1 + layer * (n_heads + 1)
        for pos in range(n_pos):
            for head in range(n_heads):
                yield Node("attn_head_out", pos, layer, head), pos, first + head
            yield Node("mlp_out", pos, layer), pos, first + n_heads


@one_at_a_time
def relevance_patch(
    model: Any,
    clean: Int[Tensor, "batch pos"],
    corrupt: Int[Tensor, "batch pos"],
    objective: Callable[[Tensor], Tensor],
    config: EdgeAttributionConfig | None = None,
    *,
    rules: str | RuleSet = PATCHING_RULES,
) -> AttributionResult:
    """Estimate the effect of patching each node, or each edge, from corrupted to clean.

    A score is (clean − corrupt) · modified gradient at the corrupted run (RelP, arXiv:2508.21258),
    averaged over the pairs of prompts. It is in the objective's units (logits for ``logit_diff``)
    and positive where the patch raises the objective, that is, supports the target. Each pair of
    prompts costs two forward passes and one backward pass.

    The result equals that of ``attribution_patch`` inside ``lrp``. In addition, edges work with
    grouped-query attention: the readers "k_input" and "v_input" then stand for one key or value
    head each (counted by ``Node.head``), which the query heads of its group share.

    Args:
        model: A ``TransformerBridge`` in evaluation mode.
        clean: Token ids of the clean prompts.
        corrupt: Token ids of the corrupted prompts, row by row.
        objective: Maps the logits of one pair's prompt, [1, pos, vocab], to a scalar, as
            ``logit_diff`` does.
        config: As for ``attribution_patch``. By default, nodes are scored.
        rules: A rule set or its name.

    Returns:
        Scores by node, and by edge if ``config`` requests edges.

    Raises:
        ValueError: The tokens differ in shape, the objective does not return a scalar, the model
            lacks these nodes, or edges are undefined because blocks are not x + attention(norm(x)),
            then x + MLP(norm(x)) (Gemma 2 also normalises outputs; GPT-NeoX runs both in parallel).
        PromptError, ModelStateError, UncoveredComponentError: As for ``lrp``.

    Example:
        >>> clean = model.to_tokens(case.prompt)
        >>> scores = clrp.patching.relevance_patch(model, clean, clean.flip(1), objective)
        >>> len(scores.node_scores)  # 44 positions of the embedding, 4 × 4 heads and 4 MLPs
        924
    """
    check_ready(model, "Relevance patching")
    rule_set = get_rule_set(rules)
    with_edges = config is not None and config.granularity == "edge"
    clean, corrupt = check_pair(clean, corrupt)
    clean, corrupt = to_tokens(model, clean), to_tokens(model, corrupt)
    metric = RecordedObjective(objective, 1, per_example=False, name="objective")
    if with_edges:
        check_additive(model)
    n_layers, n_heads = int(model.cfg.n_layers), int(model.cfg.n_heads)
    names, hook_dict = writer_names(n_layers), hook_points(model)
    for name in names:
        require_hook_point(hook_dict, name)

    total: Float[Tensor, "writer pos"] | None = None
    edge_total: EdgeReader | None = None
    for row in range(len(clean)):
        changes: dict[str, Tensor] = _activations(model, clean[row : row + 1], names)
        effects: dict[str, Tensor] = {}
        readings = [_reading(name, changes, effects) for name in names]
        reader = EdgeReader(model) if with_edges else None
        if reader is not None:
            readings += reader.readings
        run(model, corrupt[row : row + 1], metric, rule_set, readings)
        _require_all(effects, names, n_heads)
        scores = torch.cat([_writer_axis_first(effects[name]) for name in names])
        total = scores if total is None else total + scores
        if reader is not None:
            reader.score(changes, rule_set)
            reader.check(scores)
            edge_total = reader if edge_total is None else edge_total.add(reader)
    assert total is not None

    n_pairs, n_pos = clean.shape
    if edge_total is not None:
        edge_scores = edge_total.to_edges(n_pairs)
        node_scores: dict[Node, float] = {}
        for (writer, _), score in edge_scores.items():  # attribution_patch defines it like this
            node_scores[writer] = node_scores.get(writer, 0.0) + score
        return AttributionResult(node_scores, edge_scores)
    values = (total / n_pairs).tolist()
    return AttributionResult(
        {
            node: values[writer][pos]
            for node, pos, writer in _enumerate_nodes(n_layers, n_heads, n_pos)
        }
    )


def _activations(model: Any, tokens: Int[Tensor, "1 pos"], names: list[str]) -> dict[str, Tensor]:
    activations: dict[str, Tensor] = {}

    def record(name: str) -> HookFn:
        def hook_fn(tensor: Tensor, hook: Any) -> None:  # noqa: ARG001
            activations[name] = at_least_float32(tensor.detach())

        return hook_fn

    hook_dict = hook_points(model)
    hooks = [(public_name(hook_dict, name), record(name)) for name in names]
    with torch.no_grad(), own_hooks(model, hooks):
        model(tokens)
    return activations


def _reading(name: str, changes: dict[str, Tensor], effects: dict[str, Tensor]) -> Reading:
    """Turn a clean activation into the change clean − corrupt and record its effect by position."""

    def fired(x: Tensor) -> None:
        changes[name] = changes[name] - at_least_float32(x)
        effects[name] = changes[name].new_zeros(()).expand(x.shape[:-1])[0]

    def sink(x: Tensor, g: Tensor) -> None:  # noqa: ARG001
        effects[name] = (changes[name] * at_least_float32(g)).sum(-1)[0]

    return Reading(name, sink, fired=fired)


def _require_all(effects: dict[str, Tensor], names: list[str], n_heads: int) -> None:
    for name in names:
        if name.endswith("hook_z") and name in effects and effects[name].shape[-1] != n_heads:
            raise ValueError(
                f"TransformerLens splits {name!r} into {effects[name].shape[-1]} heads, but this "
                f"model has {n_heads}, so the outputs of its heads cannot be separated."
            )
        if name not in effects:
            raise ValueError(
                f"There is no gradient at {name!r}: it did not fire in this model's forward, or a "
                "hook put a constant there."
            )


def _writer_axis_first(effect: Tensor) -> Float[Tensor, "writer pos"]:
    pattern = "pos -> 1 pos" if effect.ndim == 1 else "pos head -> head pos"
    return rearrange(effect, pattern)
