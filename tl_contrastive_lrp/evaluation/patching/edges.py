"""Edge scores: how each writer's change acts through each single reader of the residual stream.

A reader's gradient is the modified gradient at its own copy of the stream. For a head's queries,
keys or values it is carried back through their weights and the norm before them; for an MLP it is
taken at the norm's input; for the logits, at the last ``hook_resid_post``. One backward pass gives
the gradients at the queries, keys and values of all heads. The copies of the stream are never made,
whereas TransformerLens forks the stream for each head in the forward (``use_split_qkv_input``).

The writers are the embedding and then, layer by layer, the heads and the MLP.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from einops import einsum, rearrange, reduce, repeat
from jaxtyping import Float
from torch import Tensor
from transformer_lens.tools.analysis.attribution_patching import Node, NodeKind

from ...engine.reading import Reading
from ...hooks.context import plan
from ...hooks.placement import attached
from ...inputs.bridge import hook_points
from ...rules.functions import at_least_float32
from ...rules.rule_sets import RuleSet
from .effects import n_heads_of

_PARTS: tuple[tuple[str, NodeKind], ...] = (("q", "q_input"), ("k", "k_input"), ("v", "v_input"))


def check_additive(model: Any) -> None:
    """Refuse a model whose blocks are not x + attention(norm(x)), then x + MLP(norm(x)).

    Raises:
        ValueError: Names the first block of another form.
    """
    hook_dict = hook_points(model)
    for layer in range(int(model.cfg.n_layers)):
        block = f"blocks.{layer}."
        aliases = (("hook_attn_out", "attn.hook_out"), ("hook_resid_mid", "ln2.hook_in"))
        same = all(
            f"{block}{one}" in hook_dict
            and hook_dict[f"{block}{one}"] is hook_dict.get(f"{block}{other}")
            for one, other in aliases
        )
        if not same or f"{block}ln1.hook_in" not in hook_dict:
            raise _no_edges(f"blocks.{layer}")


def _no_edges(where: str) -> ValueError:
    return ValueError(
        f"Edges are not defined in {where} of this model, which is not built as "
        "x + attention(norm(x)), then x + MLP(norm(x)), with heads that add up. Use node "
        'granularity, EdgeAttributionConfig(granularity="node").'
    )


class EdgeReader:
    """Gradients at the readers of one corrupted run, and the edge scores computed from them.

    Args:
        model: A bridge that ``check_additive`` accepts.

    Attributes:
        readings: What the backward pass has to read for ``score``.
        scores: One tensor [reader, writer, pos] for each group of readers: the heads of a layer,
            its MLP, and at the end the logits. A group holds the writers before its readers.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.n_layers, self.n_heads = int(model.cfg.n_layers), int(model.cfg.n_heads)
        self.n_heads_by_part = {part: n_heads_of(model, part) for part, _ in _PARTS}
        self.stream_by_layer: dict[int, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.scores: list[Tensor] = []
        self.readings = list(self._readings())

    def _readings(self) -> Iterator[Reading]:
        for layer in range(self.n_layers):
            for part, _ in _PARTS:
                yield self._gradient_reading(f"blocks.{layer}.attn.hook_{part}")
            yield self._gradient_reading(f"blocks.{layer}.ln2.hook_in")
            yield self._stream_reading(layer)
        yield self._gradient_reading(f"blocks.{self.n_layers - 1}.hook_resid_post")

    def _stream_reading(self, layer: int) -> Reading:
        def fired(x: Tensor) -> None:
            self.stream_by_layer[layer] = x

        return Reading(f"blocks.{layer}.ln1.hook_in", lambda x, g: None, fired=fired)  # noqa: ARG005

    def _gradient_reading(self, name: str) -> Reading:
        def fired(x: Tensor) -> None:
            self.gradients[name] = torch.zeros_like(x)[0]

        def sink(x: Tensor, g: Tensor) -> None:  # noqa: ARG001
            self.gradients[name] = g[0]

        return Reading(name, sink, fired=fired)

    def score(self, changes: dict[str, Tensor], rule_set: RuleSet) -> None:
        """Contract each reader's gradient with the change of every writer before it.

        Args:
            changes: Clean minus corrupted activations at the writers' HookPoints, batch size 1.
            rule_set: The rule set of the backward pass, which also carries the gradients back
                through the norms.
        """
        attachments, _ = plan(self.model, rule_set)
        written = self._written_changes(changes)
        for layer in range(self.n_layers):
            n_before = 1 + layer * (self.n_heads + 1)
            norm = tuple(a for a in attachments if a.site.path == f"blocks.{layer}.ln1")
            with attached(self.model, norm):
                at_heads = self._gradients_at_heads(layer)
            at_mlp = self._add_reader_axis(f"blocks.{layer}.ln2.hook_in")
            self.scores.append(_contract(at_heads, written[:n_before]))
            self.scores.append(_contract(at_mlp, written[: n_before + self.n_heads]))
        at_logits = self._add_reader_axis(f"blocks.{self.n_layers - 1}.hook_resid_post")
        self.scores.append(_contract(at_logits, written))
        self.stream_by_layer.clear()
        self.gradients.clear()

    def check(self, node_scores: Float[Tensor, "writer pos"]) -> None:
        """Refuse edges that do not add up to their writers' total effects.

        Args:
            node_scores: Scores of the writers, from the gradients where they write.

        Raises:
            ValueError: A reader was missed or misread, as in a block of an unknown form.
        """
        total = torch.zeros_like(node_scores)
        for group in self.scores:
            total[: group.shape[1]] += reduce(group, "reader writer pos -> writer pos", "sum")
        is_low = self.model.cfg.dtype in (torch.bfloat16, torch.float16)
        tolerance = (0.1 if is_low else 1e-3) * node_scores.abs().max()
        wrong = ((total - node_scores).abs() > tolerance).any(1).nonzero()
        if len(wrong):
            block = (int(wrong[0]) - 1) // (self.n_heads + 1)
            raise _no_edges(f"blocks.{max(block, 0)} or after it")

    def _written_changes(self, changes: dict[str, Tensor]) -> Float[Tensor, "writer pos d_model"]:
        parts = [changes["hook_embed"]]
        for layer in range(self.n_layers):
            z = changes[f"blocks.{layer}.attn.hook_z"][0]
            w_o = self.model.blocks[layer].attn.W_O.detach().to(z)
            parts.append(einsum(z, w_o, "pos head d_head, head d_head d_model -> head pos d_model"))
            parts.append(changes[f"blocks.{layer}.hook_mlp_out"])
        return torch.cat(parts)

    def _add_reader_axis(self, name: str) -> Float[Tensor, "1 pos d_model"]:
        return rearrange(self.gradients[name], "pos d_model -> 1 pos d_model")

    def _gradients_at_heads(self, layer: int) -> Float[Tensor, "reader pos d_model"]:
        """Gradients at each head's own copy of the stream: query, then key, then value heads."""
        block = self.model.blocks[layer]
        after_norm = []
        for part, _ in _PARTS:
            g = self.gradients[f"blocks.{layer}.attn.hook_{part}"]
            weight = rearrange(
                getattr(block.attn, part).original_component.weight.detach(),
                "(head d_head) d_model -> head d_head d_model",
                head=self.n_heads_by_part[part],
            )
            after_norm.append(
                einsum(
                    g,
                    weight.to(g.dtype),
                    "pos head d_head, head d_head d_model -> head pos d_model",
                )
            )
        g_norm = torch.cat(after_norm)
        x = repeat(
            self.stream_by_layer[layer], "1 pos d_model -> reader pos d_model", reader=len(g_norm)
        )
        x = x.clone().requires_grad_(True)
        (g_stream,) = torch.autograd.grad(block.ln1(x), x, g_norm.to(x.dtype))
        return g_stream

    def add(self, other: EdgeReader) -> EdgeReader:
        """Add another pair's scores to these."""
        self.scores = [a + b for a, b in zip(self.scores, other.scores, strict=True)]
        return self

    def to_edges(self, n_pairs: int) -> dict[tuple[Node, Node], float]:
        """Average the scores over the pairs, with ``enumerate_edges``' keys in its order."""
        groups = [
            rearrange(group / n_pairs, "reader writer pos -> pos reader writer").tolist()
            for group in self.scores
        ]
        edges: dict[tuple[Node, Node], float] = {}
        for pos in range(len(groups[0])):
            writers = list(self._writers(pos))
            for readers, group in zip(self._readers(pos), groups, strict=True):
                for reader, row in zip(readers, group[pos], strict=True):
                    edges.update({(w, reader): s for w, s in zip(writers, row, strict=False)})
        return edges

    def _writers(self, pos: int) -> Iterator[Node]:
        yield Node("embed", pos)
        for layer in range(self.n_layers):
            for head in range(self.n_heads):
                yield Node("attn_head_out", pos, layer, head)
            yield Node("mlp_out", pos, layer)

    def _readers(self, pos: int) -> Iterator[list[Node]]:
        for layer in range(self.n_layers):
            yield [
                Node(kind, pos, layer, head)
                for part, kind in _PARTS
                for head in range(self.n_heads_by_part[part])
            ]
            yield [Node("mlp_in", pos, layer)]
        yield [Node("logits", pos, self.n_layers - 1)]


def _contract(
    gradient: Float[Tensor, "reader pos d_model"], written: Float[Tensor, "writer pos d_model"]
) -> Float[Tensor, "reader writer pos"]:
    return einsum(
        at_least_float32(gradient).to(written),
        written,
        "reader pos d_model, writer pos d_model -> reader writer pos",
    )
