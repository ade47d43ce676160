"""Independent truth for the edges of the attribution graph, the slow way of arXiv 2604.17761.

For one target position j at a time: keep the objective's gradient at the target site at j alone,
send it back to the source site and multiply with the activation there,

    A[j, i] = sum_d h_s[i, d] * d(<g_t[j], h_t[j]>) / d(h_s[i, d]).

Two ways that share only the forward formulas of ``oracle``: automatic differentiation of
stop-gradient forms (``EdgeTruth.matrix``), and the explicit backward rules of ``oracle.backward``
(``EdgeTruth.explicit_matrix``). A third, ``frozen_forward``, is no backward at all: the model
with its norms, patterns and activation ratios held fixed, to intervene on.

    truth = EdgeTruth(hf_model("qwen3"), tokens, contrast_seed(tokens, 7, 12, 48), "attnlrp")
    for source, target in pairs(truth.sites("sublayer")):
        truth.matrix(source, target)                             # [target_pos, source_pos]
    truth.matrix(source, target, path="value", head=2)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from truth.autograd_forms import stop_gradients
from truth.oracle import forward, ops, propagate, read_model
from truth.oracle.backward import Backward
from truth.oracle.read import Block, Model
from truth.oracle.rules import resolve

PATHS = ("position", "value", "key")


def rule_forms(rules: str) -> AbstractContextManager[None]:
    """Forward operations whose ordinary gradient is the rule set's."""
    return nullcontext() if rules == "gradient" else stop_gradients(rules)


def pairs(sites: tuple[str, ...]) -> list[tuple[str, str]]:
    """The transitions between neighbouring sites."""
    return list(itertools.pairwise(sites))


def _only(x: Tensor, head: int) -> Tensor:
    """x [batch, pos, head, d_head]: the same values, gradient only to one head."""
    keep = (torch.arange(x.shape[2]) == head)[:, None]
    return torch.where(keep, x, x.detach())


@contextmanager
def one_path(path: str, head: int | None) -> Iterator[None]:
    """Cut every gradient in attention but one path's.

    "value": the values of one (query) head; "key": its keys; "position": the queries, which move
    nothing between positions. Heads are counted after keys and values were repeated for their
    group, so a head is a query head.
    """
    query_key, pattern_value = ops.query_key, ops.pattern_value  # the rule forms, if patched
    if path == "position":
        forms: dict[str, Any] = {
            "query_key": lambda q, k, c: query_key(q, k.detach(), c),
            "pattern_value": lambda p, v: pattern_value(p, v.detach()),
        }
    elif path == "value":
        forms = {"pattern_value": lambda p, v: pattern_value(p.detach(), _only(v, head))}
    else:
        forms = {
            "query_key": lambda q, k, c: query_key(q.detach(), _only(k, head), c),
            "pattern_value": lambda p, v: pattern_value(p, v.detach()),
        }
    with mock.patch.multiple(ops, **forms):
        yield


class EdgeTruth:
    """Edges of one prompt [1, pos], from a Hugging Face model and a gradient at its logits.

    seed_grad: [1, pos, vocab], as for ``propagate``. All in float64.
    """

    def __init__(self, hf_model: Any, tokens: Tensor, seed_grad: Tensor, rules: str) -> None:
        self.model: Model = read_model(hf_model)
        self.rules = rules
        self.seed = seed_grad
        self.result = propagate(hf_model, tokens, seed_grad, rules)
        self.mask = torch.ones_like(tokens)
        self.positions = forward.position_ids(self.mask)
        with torch.no_grad():
            self.values = forward.run_forward(self.model, tokens, self.mask, self.positions)

    # sites: every block is two steps, attention then MLP

    def sites(self, granularity: str = "block") -> tuple[str, ...]:
        """Names of a graph's sites, input first."""
        names = []
        for i in range(len(self.model.blocks)):
            names.append(f"blocks.{i}.hook_resid_pre")
            if granularity == "sublayer":
                names.append(f"blocks.{i}.hook_resid_mid")
        return (*names, f"blocks.{len(self.model.blocks) - 1}.hook_resid_post")

    def step(self, site: str) -> int:
        """Sublayers before a site; -1 for ``hook_embed``, before the position table."""
        if site == "hook_embed":
            return -1
        _, block, name = site.split(".")
        return 2 * int(block) + ("hook_resid_pre", "hook_resid_mid", "hook_resid_post").index(name)

    def node(self, site: str) -> Tensor:
        """Relevance of a site's positions by the explicit propagation, [pos]."""
        return self.result.relevance[site].sum(-1)[0]

    def state(self, site: str) -> Tensor:
        """The hidden states h, [pos, d_model]."""
        return self.result.activation[site][0]

    def gradient(self, site: str) -> Tensor:
        """The objective's gradient g under the rules, [pos, d_model]."""
        return self.result.gradient[site][0]

    def window(self, source: str, target: str) -> Tensor:
        """[target_pos, source_pos]: which edges attention's masks allow at all."""
        behind = self.mask.shape[1]
        allowed = torch.eye(behind, dtype=torch.bool)
        for step in range(max(self.step(source), 0), self.step(target)):
            if step % 2 == 0:
                seen = forward.visible(self.mask, self.model.blocks[step // 2].window)[0, 0]
                allowed = (seen.double() @ allowed.double()) > 0
        return allowed

    # automatic differentiation of the stop-gradient forms

    def matrix(
        self, source: str, target: str, path: str | None = None, head: int | None = None
    ) -> Tensor:
        """A[target_pos, source_pos] of a transition, over any number of blocks.

        path, head: one of ``PATHS`` alone, and for "value" and "key" one query head. Only for a
        transition with one attention, whose skip connection then counts as "position".
        """
        start, end = self.step(source), self.step(target)
        if path is not None and (start % 2 or not start < end <= start + 2):
            raise ValueError(f"{source} to {target} is not one attention, with or without its MLP")
        x = self.result.activation[source].clone().requires_grad_()
        with rule_forms(self.rules):
            h = self._run(x, start, end, path, head)
        g, n = self.gradient(target), h.shape[1]
        if not h.requires_grad:  # every way from source to target is cut: keys under "cplrp"
            return torch.zeros(n, n, dtype=h.dtype)
        rows = []
        for j in range(n):
            contribution = (g[j] * h[0, j]).sum()
            (g_x,) = torch.autograd.grad(contribution, x, retain_graph=True, allow_unused=True)
            rows.append(torch.zeros_like(x) if g_x is None else g_x * x)
        return torch.cat(rows).sum(-1).detach()

    def _run(
        self, x: Tensor, start: int, end: int, path: str | None = None, head: int | None = None
    ) -> Tensor:
        """The stream after ``end`` steps, from the one after ``start``; the forward's own parts."""
        if start < 0 <= end:
            x = x if self.model.pos_table is None else x + self.model.pos_table[self.positions]
        for step in range(max(start, 0), end):
            block, at = self.model.blocks[step // 2], f"blocks.{step // 2}."
            if step % 2 == 0:
                with nullcontext() if path is None else one_path(path, head):
                    branch = self._attention(x, block, at)
                skip = x.detach() if path in ("value", "key") else x
                x = skip + branch
            else:
                x = x + self._mlp(x, block, at)
        return x

    def _attention(self, x: Tensor, block: Block, at: str) -> Tensor:
        x = ops.norm(x, block.ln1)
        scrap: forward.Values = {}
        at += "attn."
        out = forward._attention(self.model, block, at, x, self.mask, self.positions, scrap)
        return out if block.ln1_post is None else ops.norm(out, block.ln1_post)

    def _mlp(self, x: Tensor, block: Block, at: str) -> Tensor:
        out = forward._mlp(self.model, block, at + "mlp.", ops.norm(x, block.ln2), {})
        return out if block.ln2_post is None else ops.norm(out, block.ln2_post)

    # the explicit backward rules

    @torch.no_grad()
    def explicit_matrix(self, source: str, target: str) -> Tensor:
        """The same as ``matrix`` for whole blocks (resid_pre or final resid_post), no autograd."""
        start, end = self.step(source), self.step(target)
        if start % 2 or end % 2 or not 0 <= start < end:
            raise ValueError(f"{source} to {target} is not a whole number of blocks")
        x, rows = self.state(source), []
        back = Backward(self.model, resolve(self.rules), self.values, self.positions)
        for j in range(x.shape[0]):
            g = torch.zeros_like(x)[None]
            g[0, j] = self.gradient(target)[j]
            for i in reversed(range(start // 2, end // 2)):
                g = back._block(g, self.model.blocks[i], f"blocks.{i}.")
            rows.append((g[0] * x).sum(-1))
        return torch.stack(rows)

    # forwards to intervene on

    @torch.no_grad()
    def real_forward(self, source: str, target: str, x: Tensor) -> Tensor:
        """The target's states for other source states; both [batch, pos, d_model]."""
        return self._run(x, self.step(source), self.step(target))

    @torch.no_grad()
    def frozen_forward(self, source: str, target: str, x: Tensor) -> Tensor:
        """``real_forward`` with all that CP-LRP takes for constants held at this prompt's values.

        Denominators of norms, attention patterns and activation ratios are constants, and a gate
        product a * b is replaced by its two halves, (a * b0 + a0 * b) / 2. What is left is affine
        in x, and at the prompt's own x it is the model.
        """
        for step in range(max(self.step(source), 0), self.step(target)):
            block, at = self.model.blocks[step // 2], f"blocks.{step // 2}."
            part = self._frozen_attention if step % 2 == 0 else self._frozen_mlp
            x = x + part(x, block, at)
        return x

    def _frozen_norm(self, x: Tensor, layer: ops.Norm | None, name: str) -> Tensor:
        """name: of the value whose statistics the norm takes."""
        if layer is None:
            return x
        y = (x - x.mean(-1, keepdim=True) if layer.centred else x) * layer.weight
        y = y / ops.norm_scale(self.values[name], layer)
        return y if layer.bias is None else y + layer.bias

    def _frozen_attention(self, x: Tensor, block: Block, at: str) -> Tensor:
        x = self._frozen_norm(x, block.ln1, at + "hook_resid_pre")
        value = ops.linear(x, block.value).unflatten(-1, (self.model.kv_heads, self.model.d_head))
        group = self.model.heads // self.model.kv_heads
        value = value[..., torch.arange(self.model.heads) // group, :]
        pattern = self.values[at + "attn.hook_pattern"][0]
        z = torch.einsum("hqk,bkhd->bqhd", pattern, value).flatten(-2)
        return self._frozen_norm(ops.linear(z, block.out), block.ln1_post, at + "attn.hook_out")

    def _frozen_mlp(self, x: Tensor, block: Block, at: str) -> Tensor:
        x = self._frozen_norm(x, block.ln2, at + "hook_resid_mid")
        ratio = ops.activation_ratio(self.values[at + "mlp.hook_pre"], self.model.activation)
        if block.gate is None:
            post = ops.linear(x, block.up) * ratio
        else:
            gate, up = ops.linear(x, block.gate) * ratio, ops.linear(x, block.up)
            gate0 = self.values[at + "mlp.hook_pre"] * ratio
            up0 = self.values[at + "mlp.hook_pre_linear"]
            post = 0.5 * (gate * up0 + gate0 * up)
        return self._frozen_norm(ops.linear(post, block.down), block.ln2_post, at + "mlp.hook_out")


def interventions(h: Tensor, by: float) -> Tensor:
    """[pos, pos, d_model] from h [pos, d_model]: row i is h with position i scaled by 1 + by."""
    scale = 1.0 + by * torch.eye(h.shape[0], dtype=h.dtype)
    return h[None] * scale[:, :, None]


def contributions(g: Tensor, h: Tensor) -> Tensor:
    """<g[j], h[row, j]> as [j, row]: from g [pos, d_model] and h [row, pos, d_model]."""
    return (g[None] * h).sum(-1).T
