"""Edge scores: what each writer's change does through each single reader of the residual stream.

A reader's gradient is the modified gradient at its own copy of the stream: of a head's queries,
keys or values, carried back through its weights and the norm before them; of an MLP, at the norm's
input; of the logits, at the last ``hook_resid_post``. One backward pass gives the gradients at
queries, keys and values of all heads; the copies are never made (TransformerLens forks the stream
per head in the forward instead, ``use_split_qkv_input``).

Notation: U writers (embedding, then per layer its heads and its MLP), d = d_model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.tools.analysis.attribution_patching import Node, NodeKind

from ...engine.reading import Reading
from ...hooks.context import plan
from ...hooks.placement import attached
from ...inputs.bridge import hook_points
from ...rules.functions import at_least_float32
from ...rules.rule_sets import RuleSet
from .effects import heads_of

_PARTS: tuple[tuple[str, NodeKind], ...] = (("q", "q_input"), ("k", "k_input"), ("v", "v_input"))


def check_additive(model: Any) -> None:
    """Refuse models that are not built of blocks x + attention(norm(x)), then x + MLP(norm(x)).

    Raises:
        ValueError: names the block.
    """
    points = hook_points(model)
    for layer in range(int(model.cfg.n_layers)):
        at = f"blocks.{layer}."
        ends = (("hook_attn_out", "attn.hook_out"), ("hook_resid_mid", "ln2.hook_in"))
        same = all(points.get(f"{at}{a}") is points.get(f"{at}{b}", ends) for a, b in ends)
        if not same or f"{at}ln1.hook_in" not in points:
            raise _no_edges(f"blocks.{layer}")


def _no_edges(where: str) -> ValueError:
    return ValueError(
        f"Edges are not defined in {where} of this model, which is not built as "
        "x + attention(norm(x)), then x + MLP(norm(x)), with heads that add up. Use node "
        'granularity, EdgeAttributionConfig(granularity="node").'
    )


class EdgeReader:
    """Gradients at the readers of one corrupted run, and the edge scores made of them."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.n_layers, self.n_heads = int(model.cfg.n_layers), int(model.cfg.n_heads)
        self.heads = {part: heads_of(model, part) for part, _ in _PARTS}
        self.stream: dict[int, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.scores: list[Tensor] = []  # one [reader, writer, pos] for each group of readers
        self.readings = list(self._readings())

    def _readings(self) -> Iterator[Reading]:
        last = f"blocks.{self.n_layers - 1}.hook_resid_post"
        for layer in range(self.n_layers):
            for part, _ in _PARTS:
                yield self._reading(f"blocks.{layer}.attn.hook_{part}")
            yield self._reading(f"blocks.{layer}.ln2.hook_in")
            yield self._input_of(layer)
        yield self._reading(last)

    def _input_of(self, layer: int) -> Reading:
        def fired(x: Tensor) -> None:
            self.stream[layer] = x

        return Reading(f"blocks.{layer}.ln1.hook_in", lambda x, g: None, fired=fired)  # noqa: ARG005

    def _reading(self, name: str) -> Reading:
        def fired(x: Tensor) -> None:
            self.gradients[name] = torch.zeros_like(x)[0]

        def sink(x: Tensor, g: Tensor) -> None:  # noqa: ARG001
            self.gradients[name] = g[0]

        return Reading(name, sink, fired=fired)

    def score(self, changes: dict[str, Tensor], rule_set: RuleSet) -> None:
        """Contract each reader's gradient with the change of every writer before it.

        Args:
            changes: clean − corrupt at the writers' HookPoints, batch of one.
            rule_set: What the backward pass ran under; carries the gradients through the norms.
        """
        attachments, _ = plan(self.model, rule_set)
        written = self._written(changes)  # [writer, pos, d]
        for layer in range(self.n_layers):
            before = 1 + layer * (self.n_heads + 1)
            norm = tuple(a for a in attachments if a.site.path == f"blocks.{layer}.ln1")
            with attached(self.model, norm):
                at_heads = self._at_inputs(layer)
            at_mlp = self.gradients[f"blocks.{layer}.ln2.hook_in"][None]
            self.scores.append(_contract(at_heads, written[:before]))
            self.scores.append(_contract(at_mlp, written[: before + self.n_heads]))
        at_logits = self.gradients[f"blocks.{self.n_layers - 1}.hook_resid_post"][None]
        self.scores.append(_contract(at_logits, written))
        self.stream.clear()
        self.gradients.clear()

    def check(self, nodes: Float[Tensor, "writer pos"]) -> None:
        """Refuse edges that do not add up to what their writers do in all.

        Args:
            nodes: Scores of the writers, from the gradient where each one writes.

        Raises:
            ValueError: a reader was missed or misread, as in a block built in an unknown way.
        """
        total = torch.zeros_like(nodes)
        for group in self.scores:
            total[: group.shape[1]] += group.sum(0)
        coarse = self.model.cfg.dtype in (torch.bfloat16, torch.float16)
        within = (0.1 if coarse else 1e-3) * nodes.abs().max()
        wrong = ((total - nodes).abs() > within).any(1).nonzero()
        if len(wrong):
            block = (int(wrong[0]) - 1) // (self.n_heads + 1)
            raise _no_edges(f"blocks.{max(block, 0)} or after it")

    def _written(self, changes: dict[str, Tensor]) -> Float[Tensor, "writer pos d"]:
        parts = [changes["hook_embed"]]
        for layer in range(self.n_layers):
            z = changes[f"blocks.{layer}.attn.hook_z"][0]
            w_o = self.model.blocks[layer].attn.W_O.detach().to(z)
            parts.append(torch.einsum("phe,hed->hpd", z, w_o))
            parts.append(changes[f"blocks.{layer}.hook_mlp_out"])
        return torch.cat(parts)

    def _at_inputs(self, layer: int) -> Float[Tensor, "reader pos d"]:
        """Gradients at every head's own copy of the stream: query, then key, then value heads."""
        block = self.model.blocks[layer]
        at_normed = []
        for part, _ in _PARTS:
            g = self.gradients[f"blocks.{layer}.attn.hook_{part}"]
            weight = getattr(block.attn, part).original_component.weight.detach()
            by_head = weight.unflatten(0, (self.heads[part], -1)).to(g.dtype)
            at_normed.append(torch.einsum("phe,hed->hpd", g, by_head))
        u = torch.cat(at_normed)
        x = self.stream[layer].expand(len(u), -1, -1).clone().requires_grad_(True)
        (at_stream,) = torch.autograd.grad(block.ln1(x), x, u.to(x.dtype))
        return at_stream

    def plus(self, other: EdgeReader) -> EdgeReader:
        """Both pairs' scores added up."""
        self.scores = [a + b for a, b in zip(self.scores, other.scores, strict=True)]
        return self

    def to_edges(self, pairs: int) -> dict[tuple[Node, Node], float]:
        """Scores averaged over the pairs, keyed and ordered as ``enumerate_edges`` has them."""
        groups = [(group / pairs).permute(2, 0, 1).tolist() for group in self.scores]
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
                for head in range(self.heads[part])
            ]
            yield [Node("mlp_in", pos, layer)]
        yield [Node("logits", pos, self.n_layers - 1)]


def _contract(
    gradient: Float[Tensor, "reader pos d"], written: Float[Tensor, "writer pos d"]
) -> Float[Tensor, "reader writer pos"]:
    return torch.einsum("rpd,upd->rup", at_least_float32(gradient).to(written), written)
