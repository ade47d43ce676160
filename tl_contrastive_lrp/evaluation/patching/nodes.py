"""``relevance_patch``: TransformerLens' ``attribution_patch`` with relevance for gradients.

The result is TransformerLens' own ``AttributionResult`` on its own ``Node`` keys, so whatever takes
one (``faithfulness`` takes ``top_edges``) takes this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
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
from .checks import Watched, check_pair, require_point
from .edges import EdgeReader, check_additive
from .estimates import PATCHING_RULES


def writer_names(n_layers: int) -> list[str]:
    """HookPoints that hold what each writer puts on the residual stream (heads before W_O)."""
    layers = (
        name
        for i in range(n_layers)
        for name in (f"blocks.{i}.attn.hook_z", f"blocks.{i}.hook_mlp_out")
    )
    return ["hook_embed", *layers]


def _nodes(n_layers: int, n_heads: int, n_pos: int) -> Iterator[tuple[Node, int, int]]:
    """(node, position, index of its writer), in TransformerLens' order."""
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
    """Estimated effect of patching each node, or edge, from the corrupted run towards the clean.

    Scores are (clean − corrupt) · modified gradient at the corrupted run, averaged over the pairs,
    in the objective's units: positive where the patch raises the objective. Each pair costs two
    forward passes and one backward pass. As ``attribution_patch`` inside ``lrp``, and beyond it:
    edges also with grouped-query attention, where readers "k_input" and "v_input" stand for a key
    and value head each (``Node.head`` counts those), shared by the query heads of its group.

    Args:
        model: A ``TransformerBridge`` in evaluation mode.
        clean: Token ids of the clean prompts.
        corrupt: Token ids of the corrupted prompts, row by row.
        objective: Logits of one pair's prompt [1, pos, vocab] → scalar, as from ``logit_diff``.
        config: As for ``attribution_patch``; None for nodes.
        rules: Name of a rule set, or a ``RuleSet``.

    Raises:
        ValueError: tokens of different shapes; an objective that is no scalar; a model without
            these nodes; edges of a model not built as x + attention(norm(x)), then x + MLP(norm(x))
            (Gemma 2 also normalises what they write; GPT-NeoX runs both side by side).
        PromptError, ModelStateError, UncoveredComponentError: see ``lrp``.
    """
    check_ready(model, "Relevance patching")
    rule_set = get_rule_set(rules)
    edges = config is not None and config.granularity == "edge"
    clean, corrupt = check_pair(clean, corrupt)
    clean, corrupt = to_tokens(model, clean), to_tokens(model, corrupt)
    metric = Watched(objective, 1, per_example=False, name="objective")
    if edges:
        check_additive(model)
    n_layers, n_heads = int(model.cfg.n_layers), int(model.cfg.n_heads)
    names, points = writer_names(n_layers), hook_points(model)
    for name in names:
        require_point(points, name)

    total: Tensor | None = None  # [writer, pos]
    by_reader: EdgeReader | None = None
    for row in range(len(clean)):
        changes: dict[str, Tensor] = _activations(model, clean[row : row + 1], names)
        effects: dict[str, Tensor] = {}
        readings = [_reading(name, changes, effects) for name in names]
        reader = EdgeReader(model) if edges else None
        if reader is not None:
            readings += reader.readings
        run(model, corrupt[row : row + 1], metric, rule_set, readings)
        _require_all(effects, names, n_heads)
        scores = torch.cat([_writers_first(effects[name]) for name in names])
        total = scores if total is None else total + scores
        if reader is not None:
            reader.score(changes, rule_set)
            reader.check(scores)
            by_reader = reader if by_reader is None else by_reader.plus(reader)
    assert total is not None

    pairs, n_pos = clean.shape
    if by_reader is not None:
        edge_scores = by_reader.to_edges(pairs)
        node_scores: dict[Node, float] = {}
        for (writer, _), score in edge_scores.items():  # as attribution_patch has it
            node_scores[writer] = node_scores.get(writer, 0.0) + score
        return AttributionResult(node_scores, edge_scores)
    values = (total / pairs).tolist()
    return AttributionResult(
        {node: values[w][pos] for node, pos, w in _nodes(n_layers, n_heads, n_pos)}
    )


def _activations(model: Any, tokens: Int[Tensor, "1 pos"], names: list[str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def keep(name: str) -> HookFn:
        def hook_fn(tensor: Tensor, hook: Any) -> None:  # noqa: ARG001
            found[name] = at_least_float32(tensor.detach())

        return hook_fn

    hook_dict = hook_points(model)
    hooks = [(public_name(hook_dict, name), keep(name)) for name in names]
    with torch.no_grad(), own_hooks(model, hooks):
        model(tokens)
    return found


def _reading(name: str, changes: dict[str, Tensor], effects: dict[str, Tensor]) -> Reading:
    """Turn a clean activation into the change clean − corrupt, and keep its effect by position."""

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
                f"model has {n_heads}: what its heads write cannot be told apart."
            )
        if name not in effects:
            raise ValueError(
                f"There is no gradient at {name!r}: it did not fire in this model's forward, or a "
                "hook put a constant there."
            )


def _writers_first(effect: Tensor) -> Float[Tensor, "writer pos"]:
    """[pos] or [pos, head] → [writer, pos]."""
    return effect[None] if effect.ndim == 1 else effect.T
