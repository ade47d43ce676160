"""The backward pass: the gradient of the objective, under a rule set, from logits to embeddings.

``gradient[name]`` is what arrives at a node from downstream, before any rule of the product that
makes the node. Two accounts are kept beside it:

- ``absorbed[bias]`` = b * (sum of g over positions), [batch, width]: relevance a bias keeps;
- ``leak[operation]``, [batch]: relevance that arrives at an operation less what it hands to its
  inputs and bias. It is 0 for an operation whose rule conserves.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import ops
from .forward import Values
from .read import Block, Model
from .rules import Rules


def _total(*pairs: tuple[Tensor, Tensor]) -> Tensor:
    """Sum of value * gradient over everything but the batch, [batch]."""
    return torch.stack([(x * g).flatten(1).sum(1) for x, g in pairs]).sum(0)


@dataclass
class Backward:
    """One backward pass over the values ``v`` of a forward pass."""

    model: Model
    rules: Rules
    v: Values
    positions: Tensor
    gradient: Values = field(default_factory=dict)
    absorbed: Values = field(default_factory=dict)
    leak: Values = field(default_factory=dict)

    def run(self, g: Tensor) -> None:
        """g: gradient at the (soft-capped) logits, [batch, pos, vocab]."""
        v, model = self.v, self.model
        self.gradient["logits"] = g
        raw = v["unembed.hook_out"]
        g_raw = ops.softcap_back(g, raw, model.final_cap, self.rules.softcap)
        self.leak["final_cap"] = _total((v["logits"], g)) - _total((raw, g_raw))
        self.gradient["unembed.hook_out"] = g_raw
        g = self._linear(g_raw, model.unembed)
        self.gradient["ln_final.hook_out"] = g
        g = self._norm(g, v["ln_final.hook_in"], v["ln_final.hook_out"], model.ln_final, "ln_final")
        self.gradient["ln_final.hook_in"] = g
        for i in reversed(range(len(model.blocks))):
            g = self._block(g, model.blocks[i], f"blocks.{i}.")
        self.gradient["hook_embed"] = g
        if model.pos_table is not None:
            self.gradient["hook_pos_embed"] = g
            self.absorbed["pos_embed"] = (v["hook_pos_embed"] * g).sum(1)

    def _linear(self, g: Tensor, layer: ops.Linear) -> Tensor:
        if layer.bias is not None:
            self.absorbed[layer.bias_name] = layer.bias * g.sum(1)
        return ops.linear_back(g, layer)

    def _norm(self, g: Tensor, x: Tensor, y: Tensor, layer: ops.Norm, name: str) -> Tensor:
        g_x = ops.norm_back(g, x, layer, self.rules.norm)
        kept = torch.zeros_like(g.flatten(1).sum(1))
        if layer.bias is not None:
            self.absorbed[layer.bias_name] = layer.bias * g.sum(1)
            kept = self.absorbed[layer.bias_name].sum(1)
        self.leak[name] = _total((y, g)) - _total((x, g_x)) - kept
        return g_x

    def _post_norm(self, g: Tensor, inner: str, outer: str, layer: ops.Norm | None) -> Tensor:
        """Through a sublayer's post norm, where the block has one."""
        self.gradient[outer] = g
        if layer is not None:
            g = self._norm(g, self.v[inner], self.v[outer], layer, outer + ".post_norm")
        self.gradient[inner] = g
        return g

    def _block(self, g: Tensor, block: Block, at: str) -> Tensor:
        v = self.v
        self.gradient[at + "hook_resid_post"] = g
        branch = self._post_norm(g, at + "mlp.hook_out", at + "hook_mlp_out", block.ln2_post)
        branch = self.gradient[at + "ln2.hook_out"] = self._mlp(branch, block, at + "mlp.")
        mid = v[at + "hook_resid_mid"]
        branch = self._norm(branch, mid, v[at + "ln2.hook_out"], block.ln2, at + "ln2")
        self.gradient[at + "ln2.hook_in"] = branch
        g = self.gradient[at + "hook_resid_mid"] = g + branch

        branch = self._post_norm(g, at + "attn.hook_out", at + "hook_attn_out", block.ln1_post)
        branch = self.gradient[at + "ln1.hook_out"] = self._attention(branch, block, at + "attn.")
        pre = v[at + "hook_resid_pre"]
        branch = self._norm(branch, pre, v[at + "ln1.hook_out"], block.ln1, at + "ln1")
        self.gradient[at + "ln1.hook_in"] = branch
        g = self.gradient[at + "hook_resid_pre"] = g + branch
        return g

    def _mlp(self, g: Tensor, block: Block, at: str) -> Tensor:
        """From the gradient at the MLP's output to the one at its input."""
        v, rules, name = self.v, self.rules, self.model.activation
        g = self.gradient[at + "hook_post"] = self._linear(g, block.down)
        pre, post = v[at + "hook_pre"], v[at + "hook_post"]
        if block.gate is None:
            g_pre = ops.activation_back(g, pre, name, rules.activation)
            self.gradient[at + "hook_pre"] = g_pre
            self.leak[at + "activation"] = _total((post, g)) - _total((pre, g_pre))
            return self._linear(g_pre, block.up)
        up, gate = v[at + "hook_pre_linear"], ops.activation(pre, name)
        g_gate, g_up = ops.gate_product_back(g, gate, up, rules.gate)
        self.leak[at + "gate"] = _total((post, g)) - _total((gate, g_gate), (up, g_up))
        g_pre = ops.activation_back(g_gate, pre, name, rules.activation)
        self.leak[at + "activation"] = _total((gate, g_gate)) - _total((pre, g_pre))
        self.gradient[at + "hook_pre"], self.gradient[at + "hook_pre_linear"] = g_pre, g_up
        return self._linear(g_pre, block.gate) + self._linear(g_up, block.up)

    def _attention(self, g: Tensor, block: Block, at: str) -> Tensor:
        """From the gradient at the attention's output to the one at its input."""
        v, rules = self.v, self.rules
        group = self.model.heads // self.model.kv_heads
        g = ops.split_heads(self._linear(g, block.out), self.model.heads)
        self.gradient[at + "hook_z"] = g
        pattern, value = v[at + "hook_pattern"], ops.repeat_heads(v[at + "hook_v"], group)
        g_pattern, g_value = ops.pattern_value_back(g, pattern, value, rules.pattern_value)
        self.gradient[at + "hook_pattern"] = g_pattern
        given = _total((pattern, g_pattern), (value, g_value))
        self.leak[at + "pattern_value"] = _total((v[at + "hook_z"], g)) - given
        g_value = self.gradient[at + "hook_v"] = ops.repeat_heads_back(g_value, group)

        g_query, g_key = self._scores(g_pattern, block, at)
        return (
            self._linear(ops.join_heads(g_query), block.query)
            + self._linear(ops.join_heads(g_key), block.key)
            + self._linear(ops.join_heads(g_value), block.value)
        )

    def _scores(self, g_pattern: Tensor, block: Block, at: str) -> tuple[Tensor, Tensor]:
        """From the gradient at the pattern to those at hook_q and hook_k."""
        v, rules = self.v, self.rules
        group = self.model.heads // self.model.kv_heads
        scores, uncapped = v[at + "hook_attn_scores"], v[at + "uncapped"]
        g_scores = ops.softmax_back(g_pattern, scores, rules.softmax)
        self.gradient[at + "hook_attn_scores"] = g_scores
        capped = ops.softcap(uncapped, block.cap)  # the scores, where they are visible
        through = _total((capped, g_scores))
        self.leak[at + "softmax"] = _total((v[at + "hook_pattern"], g_pattern)) - through
        g_raw = ops.softcap_back(g_scores, uncapped, block.cap, rules.softcap)
        self.leak[at + "cap"] = through - _total((uncapped, g_raw))

        query, key = v[at + "hook_rot_q"], v[at + "hook_rot_k"]
        wide = ops.repeat_heads(key, group)
        g_query, g_wide = ops.query_key_back(g_raw, query, wide, block.scale, rules.query_key)
        given = _total((query, g_query), (wide, g_wide))
        self.leak[at + "query_key"] = _total((uncapped, g_raw)) - given
        g_key = ops.repeat_heads_back(g_wide, group)
        self.gradient[at + "hook_rot_q"], self.gradient[at + "hook_rot_k"] = g_query, g_key
        if block.theta is not None:
            turn = ops.turn_of(self.positions, self.model.d_head, block.theta, g_query.dtype)
            g_query, g_key = ops.rotary_back(g_query, turn), ops.rotary_back(g_key, turn)
        g_query = self._head_norm(g_query, at + "hook_q", block.query_norm)
        g_key = self._head_norm(g_key, at + "hook_k", block.key_norm)
        return g_query, g_key

    def _head_norm(self, g: Tensor, name: str, layer: ops.Norm | None) -> Tensor:
        """Through the norm of each head's query or key, where the model has one."""
        if layer is not None:
            x = self.v[name]
            g = self._norm(g, x, ops.norm(x, layer), layer, name + ".norm")
        self.gradient[name] = g
        return g
