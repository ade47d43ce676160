"""Relevance patching: an estimate of activation patching from one backward pass.

Activation patching runs the model once for every cell that it patches. Relevance patching (RelP,
arXiv:2508.21258) estimates all cells at once, from the clean run, the corrupted run and one
backward pass of the corrupted run under a rule set:

    metric with the cell patched  ≈  metric(corrupted) + Σ (clean − corrupted) ⊙ modified gradient

- ``get_relevance_patch_*`` mirror the sweeps ``transformer_lens.patching.get_act_patch_*``: same
  arguments, shapes, order and sign.
- ``relevance_patch`` is TransformerLens' ``attribution_patch`` on its own nodes and edges.
"""

from transformer_lens import patching as _upstream

from ...errors import VersionError

if not hasattr(_upstream, "PatchingResult"):  # PatchingResult was added in 4.3
    raise VersionError(
        "tl_contrastive_lrp.patching needs TransformerLens 4.3 or newer, whose patching results it "
        'returns. Type: pip install --upgrade "transformer_lens>=4.3,<5"',
        name="transformer_lens",
    )

from .nodes import relevance_patch
from .sweeps import (
    get_relevance_patch_attn_head_all_pos_every,
    get_relevance_patch_attn_head_by_pos_every,
    get_relevance_patch_attn_head_k_all_pos,
    get_relevance_patch_attn_head_k_by_pos,
    get_relevance_patch_attn_head_out_all_pos,
    get_relevance_patch_attn_head_out_by_pos,
    get_relevance_patch_attn_head_pattern_all_pos,
    get_relevance_patch_attn_head_pattern_by_pos,
    get_relevance_patch_attn_head_pattern_dest_src_pos,
    get_relevance_patch_attn_head_q_all_pos,
    get_relevance_patch_attn_head_q_by_pos,
    get_relevance_patch_attn_head_v_all_pos,
    get_relevance_patch_attn_head_v_by_pos,
    get_relevance_patch_attn_out,
    get_relevance_patch_block_every,
    get_relevance_patch_mlp_out,
    get_relevance_patch_resid_mid,
    get_relevance_patch_resid_pre,
)

__all__ = [
    "get_relevance_patch_attn_head_all_pos_every",
    "get_relevance_patch_attn_head_by_pos_every",
    "get_relevance_patch_attn_head_k_all_pos",
    "get_relevance_patch_attn_head_k_by_pos",
    "get_relevance_patch_attn_head_out_all_pos",
    "get_relevance_patch_attn_head_out_by_pos",
    "get_relevance_patch_attn_head_pattern_all_pos",
    "get_relevance_patch_attn_head_pattern_by_pos",
    "get_relevance_patch_attn_head_pattern_dest_src_pos",
    "get_relevance_patch_attn_head_q_all_pos",
    "get_relevance_patch_attn_head_q_by_pos",
    "get_relevance_patch_attn_head_v_all_pos",
    "get_relevance_patch_attn_head_v_by_pos",
    "get_relevance_patch_attn_out",
    "get_relevance_patch_block_every",
    "get_relevance_patch_mlp_out",
    "get_relevance_patch_resid_mid",
    "get_relevance_patch_resid_pre",
    "relevance_patch",
]
