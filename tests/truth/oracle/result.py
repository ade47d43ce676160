"""The oracle's entry point and what it returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import forward
from .backward import Backward
from .read import read_model
from .rules import Rules, resolve


@dataclass(frozen=True)
class OracleResult:
    """One forward and one backward pass.

    logits: [batch, pos, vocab], after the final soft-cap.
    activation, gradient, relevance: by TransformerLens name, in TransformerLens shapes;
        relevance = activation * gradient. Names:
        hook_embed, hook_pos_embed (GPT-2), ln_final.hook_in, ln_final.hook_out,
        unembed.hook_out (before the final soft-cap), logits; and per block ``blocks.{l}.``
        hook_resid_pre, hook_resid_mid, hook_resid_post (the whole stream: skip and branch),
        ln1.hook_in, ln2.hook_in (the branch alone: what a backward hook placed there sees),
        ln1.hook_out, ln2.hook_out, attn.hook_q, attn.hook_k, attn.hook_v (as projected),
        attn.hook_rot_q, attn.hook_rot_k (after head norm and rotation),
        attn.hook_attn_scores, attn.hook_pattern, attn.hook_z, attn.hook_out, hook_attn_out,
        mlp.hook_pre, mlp.hook_pre_linear (gated), mlp.hook_post, mlp.hook_out, hook_mlp_out.
    absorbed: relevance kept by each bias, summed over positions, [batch, width of the bias], by
        TransformerLens parameter name (blocks.0.attn.b_Q, blocks.0.ln1.b, ...), and "pos_embed".
    leak: relevance each operation does not pass on, [batch]; 0 where its rule conserves.

    sum(relevance["hook_embed"]) + sum(absorbed) + sum(leak) = sum(seed * logits), per row.
    """

    logits: Tensor
    activation: dict[str, Tensor]
    gradient: dict[str, Tensor]
    relevance: dict[str, Tensor]
    absorbed: dict[str, Tensor]
    leak: dict[str, Tensor]


def propagate(
    hf_model: Any,
    tokens: Tensor,
    seed_grad: Tensor,
    rules: str | Rules = "attnlrp",
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> OracleResult:
    """Propagate relevance through a Hugging Face model, read from its config and state dict.

    Args:
        hf_model: causal LM of a known family; only its configuration and weights are used.
        tokens: [batch, pos] ids.
        seed_grad: [batch, pos, vocab], gradient of the objective at the (soft-capped) logits.
        rules: name of a rule set, or a ``Rules``.
        attention_mask: [batch, pos] of 0 and 1; None means all 1.
        position_ids: [batch, pos]; None derives them from the mask as TransformerBridge does.
        dtype: what everything is computed in.
    """
    mask = torch.ones_like(tokens) if attention_mask is None else attention_mask
    positions = forward.position_ids(mask) if position_ids is None else position_ids
    with torch.no_grad():
        model = read_model(hf_model, dtype)
        values = forward.run_forward(model, tokens, mask, positions)
        back = Backward(model, resolve(rules), values, positions)
        back.run(seed_grad.to(dtype))
        relevance = {name: values[name] * g for name, g in back.gradient.items()}
        for name in relevance:
            if name.endswith("hook_attn_scores"):  # a hidden score is no number to take part
                hidden = values[name] == torch.finfo(dtype).min
                relevance[name] = relevance[name].masked_fill(hidden, 0.0)
    activation = {name: values[name] for name in back.gradient}
    return OracleResult(
        values["logits"], activation, back.gradient, relevance, back.absorbed, back.leak
    )


def contrast_seed(
    tokens: Tensor, target: int, contrast: int, vocab: int, position: int = -1
) -> Tensor:
    """[batch, pos, vocab]: +1 at the target's logit, -1 at the contrast's, at one position."""
    seed = torch.zeros(*tokens.shape, vocab, dtype=torch.float64)
    seed[:, position, target] += 1.0
    seed[:, position, contrast] -= 1.0
    return seed
