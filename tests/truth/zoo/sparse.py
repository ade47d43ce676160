"""Decoders with mixtures of experts."""

from __future__ import annotations

from .row import Row, llama_like, rope, windows, without

_WIDTHLESS = without(llama_like(hidden_size=32), "head_dim")
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_ROUTED = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "moe_intermediate_size": 20, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5,
}  # fmt: skip
_MLA = {
    "kv_lora_rank": 12, "q_lora_rank": 14, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6,
    "v_head_dim": 10, "num_key_value_heads": 4, "attention_bias": True,
}  # fmt: skip

ROWS: tuple[Row, ...] = (
    Row("mixtral", "MixtralForCausalLM", llama_like(sliding_window=4, **_LOCAL)),
    Row("phimoe", "PhimoeForCausalLM", {
        **_WIDTHLESS, **_LOCAL, "attention_bias": True, "lm_head_bias": True,
        "router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
        "LayerNorm; sparse mixing of two experts", architecture="PhiMoEForCausalLM"),
    Row("qwen2_moe", "Qwen2MoeForCausalLM", {
        **_WIDTHLESS, **_EXPERTS, "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 28, "norm_topk_prob": False},
        "a shared expert behind a sigmoid gate"),
    Row("qwen2_moe-mixed", "Qwen2MoeForCausalLM", {
        **_WIDTHLESS, **_EXPERTS, "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 28, "norm_topk_prob": True, "mlp_only_layers": [0]},
        "a dense layer, then a sparse one"),
    Row("qwen3_moe", "Qwen3MoeForCausalLM", llama_like(
        attention_bias=True, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=20,
        norm_topk_prob=True)),
    Row("qwen3_moe-raw", "Qwen3MoeForCausalLM", llama_like(
        attention_bias=True, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=20,
        norm_topk_prob=False), "router weights do not sum to 1"),
    Row("olmoe", "OlmoeForCausalLM", {**_WIDTHLESS, **_EXPERTS, "attention_bias": True}),
    Row("flex_olmo", "FlexOlmoForCausalLM", {**_WIDTHLESS, **_EXPERTS, "attention_bias": True}),
    Row("granitemoe", "GraniteMoeForCausalLM", {
        **_WIDTHLESS, **_LOCAL, "attention_bias": True, "embedding_multiplier": 1.7,
        "logits_scaling": 1.3, "residual_multiplier": 0.6, "attention_multiplier": 0.4}),
    Row("granitemoehybrid-attention", "GraniteMoeHybridForCausalLM", {
        **_WIDTHLESS, **_LOCAL, "attention_bias": True, "shared_intermediate_size": 20,
        "layer_types": windows("f", "f"), "position_embedding_type": "rope",
        "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8,
        "embedding_multiplier": 1.7, "logits_scaling": 1.3, "residual_multiplier": 0.6,
        "attention_multiplier": 0.4}, "attention layers alone"),
    Row("jetmoe", "JetMoeForCausalLM", {
        **without(llama_like(), "head_dim", "num_attention_heads"), **_LOCAL, "kv_channels": 8,
        "num_key_value_heads": 2, "activation_function": "silu"},
        "attention's projections are experts too"),
    Row("gpt_oss", "GptOssForCausalLM", llama_like(
        num_local_experts=4, num_experts_per_tok=2, sliding_window=4,
        layer_types=windows("s", "f"), attention_bias=True), "attention sinks; clamped experts"),
    Row("deepseek_v2", "DeepseekV2ForCausalLM", {
        **without(llama_like(), "head_dim"), **_MLA, **_ROUTED, "mlp_bias": True}, "MLA"),
    Row("deepseek_v2-groups", "DeepseekV2ForCausalLM", {
        **without(llama_like(), "head_dim"), **_MLA, **_ROUTED, "q_lora_rank": None,
        "topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1}),
    Row("deepseek_v3", "DeepseekV3ForCausalLM", {
        **without(llama_like(), "head_dim"), **_MLA, **_ROUTED, "n_group": 2, "topk_group": 1,
        "norm_topk_prob": True}, "sigmoid router with a correction"),
    Row("glm4_moe", "Glm4MoeForCausalLM", llama_like(
        attention_bias=True, use_qk_norm=True, rope_parameters=rope(partial=0.5), **_ROUTED,
        n_group=2, topk_group=1)),
    Row("glm4_moe_lite", "Glm4MoeLiteForCausalLM", {
        **without(llama_like(), "head_dim"), **_MLA, **without(_ROUTED, "first_k_dense_replace"),
        "mlp_layer_types": ["dense", "sparse"], "n_group": 2, "topk_group": 1}),
    Row("glm_moe_dsa", "GlmMoeDsaForCausalLM", {
        **without(llama_like(), "head_dim"), **_MLA, **without(_ROUTED, "first_k_dense_replace"),
        "mlp_layer_types": ["dense", "sparse"], "index_topk": 4, "index_head_dim": 8,
        "index_n_heads": 2}, "an indexer chooses keys"),
    Row("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", {
        **_WIDTHLESS, "use_bias": True, "moe_num_experts": 4, "moe_k": 2,
        "moe_intermediate_size": 20, "moe_num_shared_experts": 1, "moe_layer_start_index": 1,
        "moe_layer_end_index": 1, "moe_layer_interval": 1}),
    Row("minimax_m2", "MiniMaxM2ForCausalLM", llama_like(
        **_LOCAL, rope_parameters=rope(partial=0.5)), "sigmoid router"),
    Row("afmoe", "AfmoeForCausalLM", llama_like(
        num_dense_layers=1, num_experts=4, num_experts_per_tok=2, num_shared_experts=1,
        moe_intermediate_size=20, route_scale=1.5, sliding_window=4, layer_types=windows("s", "f"),
        attention_bias=True, mup_enabled=True), "attention's output behind a sigmoid gate"),
    Row("laguna", "LagunaForCausalLM", llama_like(
        attention_bias=True, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=20,
        shared_expert_intermediate_size=28, sliding_window=4, layer_types=windows("s", "f"),
        mlp_layer_types=["dense", "sparse"], num_attention_heads_per_layer=[4, 4],
        moe_routed_scaling_factor=1.5, rope_parameters={
            "full_attention": rope(400.0, 0.5), "sliding_attention": rope(20.0, 1.0)})),
    Row("llama4_text", "Llama4ForCausalLM", llama_like(
        num_hidden_layers=3, intermediate_size_mlp=28, num_local_experts=4, num_experts_per_tok=1,
        interleave_moe_layer_step=2, no_rope_layers=[1, 1, 0], attention_chunk_size=4,
        layer_types=windows("c", "c", "f"), floor_scale=4, attention_bias=True),
        "router's sigmoid on the experts' input; temperature grows with position"),
    Row("gemma4_text-moe", "Gemma4ForCausalLM", {
        **without(llama_like(tie_word_embeddings=True), "rope_parameters"), "sliding_window": 4,
        "layer_types": windows("s", "f"), "hidden_size_per_layer_input": 0,
        "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
        "moe_intermediate_size": 20, "attention_bias": True, "rope_parameters": {
            "sliding_attention": rope(20.0), "full_attention": {
                "rope_type": "proportional", "rope_theta": 400.0, "partial_rotary_factor": 0.25}}},
        seed=2),
    Row("deepseek_v4", "DeepseekV4ForCausalLM", {
        **without(llama_like(), "rope_parameters", "num_key_value_heads"),
        "moe_intermediate_size": 20, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "n_shared_experts": 1, "q_lora_rank": 14, "o_lora_rank": 12, "o_groups": 2,
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "mlp_layer_types": ["moe", "moe"], "index_n_heads": 2, "index_head_dim": 8,
        "index_topk": 3, "sliding_window": 4, "hc_mult": 2, "hc_sinkhorn_iters": 3,
        "rope_theta": 80.0, "partial_rotary_factor": 0.5},
        "several residual streams; compressed keys"),
)  # fmt: skip
