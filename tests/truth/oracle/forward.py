"""The forward pass, every intermediate value kept under its TransformerLens name."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from .read import Block, Model

Values = dict[str, Tensor]


def position_ids(mask: Tensor) -> Tensor:
    """[batch, pos] positions as TransformerBridge hands them on for a 0/1 mask.

    A row in which a masked token precedes a real one counts its real tokens from 0 (masked
    tokens before the first get 0); any other row is 0, 1, 2, ...
    """
    counted = (mask.long().cumsum(1) - 1).clamp(min=0)
    plain = torch.arange(mask.shape[1]).expand_as(counted)
    moved = ((counted != plain) & (mask != 0)).any(dim=1, keepdim=True)
    return torch.where(moved, counted, plain)


def visible(mask: Tensor, window: int | None) -> Tensor:
    """[batch, 1, query, key]: key not after query, within the window, and not masked."""
    index = torch.arange(mask.shape[1])
    behind = index[:, None] - index[None, :]
    seen = behind >= 0
    if window is not None:
        seen = seen & (behind < window)
    return seen & (mask != 0)[:, None, None, :]


def run_forward(model: Model, tokens: Tensor, mask: Tensor, positions: Tensor) -> Values:
    """Every value by name; ``"logits"`` are after the final soft-cap."""
    v: Values = {}
    x = v["hook_embed"] = model.embed[tokens] * model.embed_scale
    if model.pos_table is not None:
        v["hook_pos_embed"] = model.pos_table[positions]
        x = x + v["hook_pos_embed"]
    for i, block in enumerate(model.blocks):
        x = _block(model, block, f"blocks.{i}.", x, mask, positions, v)
    v["ln_final.hook_in"] = x
    v["ln_final.hook_out"] = ops.norm(x, model.ln_final)
    v["unembed.hook_out"] = ops.linear(v["ln_final.hook_out"], model.unembed)
    v["logits"] = ops.softcap(v["unembed.hook_out"], model.final_cap)
    return v


def _block(
    model: Model, block: Block, at: str, x: Tensor, mask: Tensor, positions: Tensor, v: Values
) -> Tensor:
    v[at + "hook_resid_pre"] = v[at + "ln1.hook_in"] = x
    v[at + "ln1.hook_out"] = ops.norm(x, block.ln1)
    out = _attention(model, block, at + "attn.", v[at + "ln1.hook_out"], mask, positions, v)
    v[at + "hook_attn_out"] = out if block.ln1_post is None else ops.norm(out, block.ln1_post)
    x = x + v[at + "hook_attn_out"]
    v[at + "hook_resid_mid"] = v[at + "ln2.hook_in"] = x
    v[at + "ln2.hook_out"] = ops.norm(x, block.ln2)
    out = _mlp(model, block, at + "mlp.", v[at + "ln2.hook_out"], v)
    v[at + "hook_mlp_out"] = out if block.ln2_post is None else ops.norm(out, block.ln2_post)
    x = v[at + "hook_resid_post"] = x + v[at + "hook_mlp_out"]
    return x


def _attention(
    model: Model, block: Block, at: str, x: Tensor, mask: Tensor, positions: Tensor, v: Values
) -> Tensor:
    group = model.heads // model.kv_heads
    query = v[at + "hook_q"] = ops.split_heads(ops.linear(x, block.query), model.heads)
    key = v[at + "hook_k"] = ops.split_heads(ops.linear(x, block.key), model.kv_heads)
    value = v[at + "hook_v"] = ops.split_heads(ops.linear(x, block.value), model.kv_heads)
    if block.query_norm is not None:
        query = ops.norm(query, block.query_norm)
    if block.key_norm is not None:
        key = ops.norm(key, block.key_norm)
    if block.theta is not None:
        turn = ops.turn_of(positions, model.d_head, block.theta, x.dtype)
        query, key = ops.rotary(query, turn), ops.rotary(key, turn)
    v[at + "hook_rot_q"], v[at + "hook_rot_k"] = query, key
    uncapped = ops.query_key(query, ops.repeat_heads(key, group), block.scale)
    v[at + "uncapped"] = uncapped
    # Hugging Face adds the dtype's smallest number, so a row without any visible key is uniform.
    hidden = torch.full_like(uncapped, torch.finfo(x.dtype).min)
    scores = torch.where(visible(mask, block.window), ops.softcap(uncapped, block.cap), hidden)
    v[at + "hook_attn_scores"] = scores
    pattern = v[at + "hook_pattern"] = ops.softmax(scores)
    v[at + "hook_z"] = ops.pattern_value(pattern, ops.repeat_heads(value, group))
    v[at + "hook_out"] = ops.linear(ops.join_heads(v[at + "hook_z"]), block.out)
    return v[at + "hook_out"]


def _mlp(model: Model, block: Block, at: str, x: Tensor, v: Values) -> Tensor:
    if block.gate is None:
        v[at + "hook_pre"] = ops.linear(x, block.up)
        v[at + "hook_post"] = ops.activation(v[at + "hook_pre"], model.activation)
    else:
        v[at + "hook_pre"] = ops.linear(x, block.gate)
        v[at + "hook_pre_linear"] = ops.linear(x, block.up)
        gate = ops.activation(v[at + "hook_pre"], model.activation)
        v[at + "hook_post"] = ops.gate_product(gate, v[at + "hook_pre_linear"])
    v[at + "hook_out"] = ops.linear(v[at + "hook_post"], block.down)
    return v[at + "hook_out"]
