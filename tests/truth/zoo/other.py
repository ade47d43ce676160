"""Encoders, encoder-decoders, and decoders with a mixer that is no attention."""

from __future__ import annotations

from .row import SPECIAL, Row, llama_like, rope, windows, without

_WIDTHLESS = without(llama_like(hidden_size=32), "head_dim")
_BERT = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40,
    "max_position_embeddings": 64, "layer_norm_eps": 1e-3, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, **SPECIAL,
}  # fmt: skip
_BART = {
    "d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 3,
    "decoder_attention_heads": 3, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40,
    "max_position_embeddings": 64, "dropout": 0.0, "attention_dropout": 0.0,
    "decoder_start_token_id": 2, "forced_eos_token_id": 2, **SPECIAL,
}  # fmt: skip
_T5 = {
    "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 3,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16,
    "dropout_rate": 0.0, "layer_norm_epsilon": 1e-3, "decoder_start_token_id": 0, **SPECIAL,
}  # fmt: skip
_GEMMA_HALF = without(llama_like(
    query_pre_attn_scalar=10, sliding_window=4, layer_types=windows("s", "f"),
    attn_logit_softcapping=2.5, final_logit_softcapping=3.0, attention_bias=True))  # fmt: skip
_MAMBA = {
    "hidden_size": 24, "state_size": 8, "num_hidden_layers": 2, "conv_kernel": 3, "expand": 2,
    "time_step_rank": 4, "use_bias": True, "layer_norm_epsilon": 1e-3, **SPECIAL,
}  # fmt: skip
_SSD = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_d_conv": 3,
    "mamba_chunk_size": 4, "mamba_proj_bias": True,
}  # fmt: skip
_DELTA = {
    "linear_conv_kernel_dim": 3, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "layer_types": windows("l", "f"),
    "rope_parameters": rope(partial=0.5), "attention_bias": True,
}  # fmt: skip
_MOE = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 28,
}  # fmt: skip

ENCODERS: tuple[Row, ...] = (
    Row("bert", "BertForMaskedLM", _BERT, "post-norm; a nonlinear head", "encoder"),
    Row("bert-decoder", "BertLMHeadModel", {**_BERT, "is_decoder": True}, "causal"),
    Row("roberta", "RobertaForMaskedLM", _BERT, "positions count from the padding id", "encoder"),
)

ENCODER_DECODERS: tuple[Row, ...] = tuple(
    Row(name, model, kwargs, remark, "encoder-decoder")
    for name, model, kwargs, remark in (
        ("bart", "BartForConditionalGeneration", _BART, ""),
        ("mbart", "MBartForConditionalGeneration", _BART, ""),
        ("blenderbot", "BlenderbotForConditionalGeneration", _BART, ""),
        ("pegasus", "PegasusForConditionalGeneration", _BART, ""),
        ("marian", "MarianMTModel",
         {**_BART, "decoder_vocab_size": 48, "scale_embedding": True}, ""),
        ("m2m_100", "M2M100ForConditionalGeneration", _BART, ""),
        ("led", "LEDForConditionalGeneration", {
            **without(_BART, "max_position_embeddings"), "attention_window": 4,
            "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64}, ""),
        ("t5", "T5ForConditionalGeneration", _T5, "ReLU"),
        ("t5-gated", "T5ForConditionalGeneration",
         {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, "as T5 1.1"),
        ("mt5", "MT5ForConditionalGeneration", {**_T5, "feed_forward_proj": "gated-gelu"}, ""),
        ("longt5", "LongT5ForConditionalGeneration", {**_T5, "local_radius": 3}, ""),
        ("switch_transformers", "SwitchTransformersForConditionalGeneration", {
            **_T5, "num_experts": 4, "expert_capacity": 16, "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1, "router_jitter_noise": 0.0}, ""),
        ("t5gemma", "T5GemmaForConditionalGeneration", {
            "encoder": _GEMMA_HALF, "decoder": _GEMMA_HALF, **SPECIAL}, ""),
    )
)  # fmt: skip

RECURRENT: tuple[Row, ...] = tuple(
    Row(name, model, kwargs, remark, "recurrent")
    for name, model, kwargs, remark in (
        ("mamba", "MambaForCausalLM", _MAMBA, ""),
        ("falcon_mamba", "FalconMambaForCausalLM", _MAMBA, "norms inside the mixer"),
        ("mamba2", "Mamba2ForCausalLM", {
            **_MAMBA, "num_heads": 4, "head_dim": 12, "n_groups": 2, "chunk_size": 4}, ""),
        ("rwkv", "RwkvForCausalLM", {
            "hidden_size": 24, "attention_hidden_size": 24, "intermediate_size": 40,
            "num_hidden_layers": 2, "context_length": 64, "layer_norm_epsilon": 1e-3,
            "rescale_every": 0, **SPECIAL}, ""),
        ("jamba", "JambaForCausalLM", {
            **_WIDTHLESS, "num_experts": 4, "num_experts_per_tok": 2, "expert_layer_period": 2,
            "expert_layer_offset": 1, "attn_layer_period": 2, "attn_layer_offset": 1,
            "use_mamba_kernels": False, "mamba_d_state": 8, "mamba_d_conv": 3,
            "mamba_dt_rank": 4, "mamba_proj_bias": True}, "no positions in attention"),
        ("bamba", "BambaForCausalLM", {
            **_WIDTHLESS, **_SSD, "attn_layer_indices": [1], "attention_bias": True,
            "mlp_bias": True, "rope_parameters": rope(partial=0.5)}, ""),
        ("granitemoehybrid", "GraniteMoeHybridForCausalLM", {
            **_WIDTHLESS, **_SSD, "attention_bias": True, "num_local_experts": 4,
            "num_experts_per_tok": 2, "shared_intermediate_size": 20,
            "layer_types": windows("l", "f"), "position_embedding_type": "rope",
            "embedding_multiplier": 1.7, "logits_scaling": 1.3, "residual_multiplier": 0.6,
            "attention_multiplier": 0.4}, ""),
        ("falcon_h1", "FalconH1ForCausalLM", {
            **_WIDTHLESS, **_SSD, "mamba_d_ssm": 64, "attention_bias": True, "mlp_bias": True,
            "projectors_bias": True, "embedding_multiplier": 1.7, "key_multiplier": 0.6,
            "attention_out_multiplier": 0.8, "mlp_multipliers": [0.7, 1.2]},
         "attention and mixer side by side"),
        ("nemotron_h", "NemotronHForCausalLM", {
            **llama_like(attention_bias=True, mlp_bias=True), "layer_norm_epsilon": 1e-3,
            "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
            "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 12, "n_groups": 2,
            "conv_kernel": 3, "chunk_size": 4, "use_mamba_kernels": False, "use_bias": True,
            "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
            "moe_intermediate_size": 20, "moe_shared_expert_intermediate_size": 28},
         "one sublayer a block"),
        ("zamba2", "Zamba2ForCausalLM", {
            **without(_WIDTHLESS, "rms_norm_eps"), "rms_norm_eps": 1e-3, "num_hidden_layers": 3,
            "num_key_value_heads": 4, "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
            "mamba_d_state": 8, "mamba_d_conv": 3, "mamba_ngroups": 1, "n_mamba_heads": 4,
            "chunk_size": 4, "use_mamba_kernels": False, "use_mem_rope": True,
            "use_shared_attention_adapter": True, "adapter_rank": 4, "add_bias_linear": True},
         "one attention block shared by layers"),
        ("lfm2", "Lfm2ForCausalLM", {
            **without(_WIDTHLESS, "rms_norm_eps"), "norm_eps": 1e-3, "conv_bias": True,
            "conv_L_cache": 3, "layer_types": ["conv", "full_attention"],
            "block_auto_adjust_ff_dim": False}, "gated short convolutions"),
        ("lfm2_moe", "Lfm2MoeForCausalLM", {
            **without(_WIDTHLESS, "rms_norm_eps"), "norm_eps": 1e-3, "conv_bias": True,
            "conv_L_cache": 3, "layer_types": ["conv", "full_attention"], "num_experts": 4,
            "num_experts_per_tok": 2, "moe_intermediate_size": 20, "num_dense_layers": 1}, ""),
        ("recurrent_gemma", "RecurrentGemmaForCausalLM", {
            **without(llama_like(tie_word_embeddings=True), "rope_parameters"),
            "hidden_size": 32, "lru_width": 32, "attention_window_size": 4, "conv1d_width": 3,
            "logits_soft_cap": 3.0, "block_types": ["recurrent", "attention"],
            "attention_bias": True, "rope_parameters": rope(partial=0.5)}, ""),
        ("qwen3_next", "Qwen3NextForCausalLM", llama_like(**_DELTA, **_MOE, norm_topk_prob=True),
         "gated delta rule; gated attention"),
        ("qwen3_5_text", "Qwen3_5ForCausalLM", llama_like(**_DELTA), ""),
        ("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", llama_like(**_DELTA, **_MOE), ""),
        ("olmo_hybrid", "OlmoHybridForCausalLM", {
            **_WIDTHLESS, **without(_DELTA, "rope_parameters"), "linear_num_value_heads": 2}, ""),
    )
)  # fmt: skip

# Classes that no AutoModel for text loads without a vision or audio part, of which the text part
# is what a prompt goes through.
COMPOSITE: tuple[Row, ...] = ()

ROWS: tuple[Row, ...] = ENCODERS + ENCODER_DECODERS + RECURRENT + COMPOSITE
