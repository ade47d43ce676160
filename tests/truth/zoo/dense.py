"""Decoders whose every layer is attention and one dense MLP."""

from __future__ import annotations

from .row import SPECIAL, Row, llama_like, rope, windows, without

_UNKNOWN = "Could not determine supported architecture"
_GPT = {
    "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 64, "layer_norm_epsilon": 1e-3,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **SPECIAL,
}  # fmt: skip
_NEOX = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40,
    "max_position_embeddings": 64, "layer_norm_eps": 1e-3, "tie_word_embeddings": False,
    "rope_parameters": rope(partial=0.5), **SPECIAL,
}  # fmt: skip
_OPT = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "ffn_dim": 40,
    "max_position_embeddings": 64, "word_embed_proj_dim": 24, "dropout": 0.0, **SPECIAL,
}  # fmt: skip
_FALCON = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "ffn_hidden_size": 40,
    "layer_norm_epsilon": 1e-3, "bias": True, "max_position_embeddings": 64,
    "rope_parameters": rope(), **SPECIAL,
}  # fmt: skip
_MPT = {
    "d_model": 24, "n_heads": 3, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 64,
    "layer_norm_epsilon": 1e-3, **SPECIAL,
}  # fmt: skip
_LAYERNORM = without(llama_like(layer_norm_eps=1e-3), "rms_norm_eps")
_WIDTHLESS = without(llama_like(hidden_size=32), "head_dim")
_GEMMA = llama_like(tie_word_embeddings=True, query_pre_attn_scalar=10, sliding_window=4)
_STABLELM = without(
    {**_LAYERNORM, "hidden_size": 32, "use_qkv_bias": True, "rope_parameters": rope(partial=0.5)},
    "head_dim",
)
_PHI = without({**_LAYERNORM, "hidden_size": 32, "rope_parameters": rope(partial=0.5)}, "head_dim")

ROWS: tuple[Row, ...] = (
    # learned positions or ALiBi
    Row("gpt2", "GPT2LMHeadModel", {**_GPT, "n_inner": 40}),
    Row("gpt2-by-layer", "GPT2LMHeadModel",
        {**_GPT, "n_inner": 40, "scale_attn_by_inverse_layer_idx": True},
        "scores are divided by the layer's number"),
    Row("gpt_neo", "GPTNeoForCausalLM", {
        "hidden_size": 24, "num_layers": 2, "num_heads": 3, "intermediate_size": 40,
        "attention_types": [[["global", "local"], 1]], "window_size": 4,
        "max_position_embeddings": 64, "layer_norm_epsilon": 1e-3, **SPECIAL},
        "scores are not scaled; a global and a local layer"),
    Row("gptj", "GPTJForCausalLM", {**_GPT, "n_inner": 40, "rotary_dim": 4},
        "parallel; one norm for both branches"),
    Row("codegen", "CodeGenForCausalLM", {**_GPT, "n_head": 4, "n_embd": 32, "n_inner": 40,
        "rotary_dim": 4}, "parallel; fused and interleaved qkv"),
    Row("gpt_neox", "GPTNeoXForCausalLM", {**_NEOX, "use_parallel_residual": True}),
    Row("gpt_neox-sequential", "GPTNeoXForCausalLM", {**_NEOX, "use_parallel_residual": False}),
    Row("gpt_bigcode", "GPTBigCodeForCausalLM", {**_GPT, "n_inner": 40, "multi_query": True}),
    Row("gpt_bigcode-mha", "GPTBigCodeForCausalLM", {**_GPT, "n_inner": 40, "multi_query": False},
        unbootable="only supports multi_query=True"),
    Row("openai_gpt", "OpenAIGPTLMHeadModel", {**_GPT, "afn": "gelu"}, "post-norm, no final norm"),
    Row("opt", "OPTForCausalLM", _OPT),
    Row("opt-post-norm", "OPTForCausalLM",
        {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 16},
        "as opt-350m: norms after the sublayers, projections about the stack"),
    Row("bloom", "BloomForCausalLM", {
        "hidden_size": 24, "n_layer": 2, "n_head": 3, "layer_norm_epsilon": 1e-3, **SPECIAL},
        "ALiBi; a norm after the embedding"),
    Row("bloom-residual", "BloomForCausalLM", {
        "hidden_size": 24, "n_layer": 2, "n_head": 3, "layer_norm_epsilon": 1e-3,
        "apply_residual_connection_post_layernorm": True, **SPECIAL},
        "the skip connection leaves from the norm's output"),
    Row("falcon", "FalconForCausalLM", {**_FALCON, "multi_query": True},
        "parallel, one key and value head"),
    Row("falcon-new", "FalconForCausalLM", {
        **_FALCON, "new_decoder_architecture": True, "hidden_size": 32, "num_attention_heads": 4,
        "num_kv_heads": 2, "multi_query": True}, "as falcon-40b: two norms before the branches",
        unbootable="split_sizes"),
    Row("falcon-new-one-kv", "FalconForCausalLM", {
        **_FALCON, "new_decoder_architecture": True, "num_kv_heads": 1, "multi_query": True}),
    Row("falcon-new-mha", "FalconForCausalLM", {
        **_FALCON, "new_decoder_architecture": True, "num_kv_heads": 3, "multi_query": False},
        differs="qkv is interleaved by key head, TransformerLens splits it in three"),
    Row("falcon-alibi", "FalconForCausalLM", {
        **_FALCON, "alibi": True, "multi_query": False, "parallel_attn": False}, "as falcon-rw"),
    Row("mpt", "MptForCausalLM", _MPT, "ALiBi; no biases"),
    Row("xglm", "XGLMForCausalLM", {
        "d_model": 24, "ffn_dim": 40, "num_layers": 2, "attention_heads": 3, "dropout": 0.0,
        "attention_dropout": 0.0, "max_position_embeddings": 64, **SPECIAL}),
    # rotary, LayerNorm
    Row("phi", "PhiForCausalLM", _PHI, "parallel"),
    Row("phi-qk-norm", "PhiForCausalLM", {**_PHI, "qk_layernorm": True},
        unbootable="adapter did not declare 'q_norm'"),
    Row("stablelm", "StableLmForCausalLM", _STABLELM),
    Row("stablelm-parallel", "StableLmForCausalLM", {**_STABLELM, "use_parallel_residual": True}),
    Row("stablelm-qk-norm", "StableLmForCausalLM", {**_STABLELM, "qk_layernorm": True}),
    Row("starcoder2", "Starcoder2ForCausalLM", {
        **without(_WIDTHLESS, "rms_norm_eps"), "norm_epsilon": 1e-5, "use_bias": True},
        "norm_epsilon at its default: TransformerLens 4.3 does not pass it on"),
    Row("starcoder2-window", "Starcoder2ForCausalLM", {
        **without(_WIDTHLESS, "rms_norm_eps"), "norm_epsilon": 1e-5, "use_bias": True,
        "sliding_window": 4}),
    Row("nemotron", "NemotronForCausalLM", {
        **without(llama_like(norm_eps=1e-3), "rms_norm_eps"), "rope_parameters": rope(partial=0.5),
        "attention_bias": True, "mlp_bias": True}, "LayerNorm with 1 + weight; ReLU squared",
        seed=1),
    Row("jais2", "Jais2ForCausalLM", {**_LAYERNORM, "hidden_size": 32}, "ReLU squared"),
    Row("cohere", "CohereForCausalLM", {
        **without(_LAYERNORM, "head_dim"), "hidden_size": 32, "logit_scale": 0.3,
        "attention_bias": True, "tie_word_embeddings": True}, "parallel; logits scaled"),
    Row("cohere-qk-norm", "CohereForCausalLM", {
        **without(_LAYERNORM, "head_dim"), "hidden_size": 32, "logit_scale": 0.3,
        "attention_bias": True, "use_qk_norm": True, "tie_word_embeddings": True}),
    Row("cohere2", "Cohere2ForCausalLM", {
        **_LAYERNORM, "logit_scale": 0.3, "attention_bias": True, "sliding_window": 4,
        "layer_types": windows("s", "f"), "tie_word_embeddings": True},
        "rotary in the sliding layers alone"),
    Row("olmo", "OlmoForCausalLM", {
        **without(_WIDTHLESS, "rms_norm_eps"), "attention_bias": True, "clip_qkv": None},
        "LayerNorm without weights"),
    Row("olmo-clipped", "OlmoForCausalLM", {
        **without(_WIDTHLESS, "rms_norm_eps"), "attention_bias": True, "clip_qkv": 1.5},
        "clamps q, k and v"),
    Row("modernbert_decoder", "ModernBertDecoderForCausalLM", {
        **without(llama_like(norm_eps=1e-3), "rms_norm_eps", "rope_parameters", "head_dim",
                  "num_key_value_heads"),
        "num_hidden_layers": 3, "layer_types": windows("f", "s", "f"), "local_attention": 6,
        "norm_bias": True, "attention_bias": True, "mlp_bias": True, "sep_token_id": 2,
        "cls_token_id": 1}),
    # rotary, RMSNorm
    Row("llama", "LlamaForCausalLM", llama_like(attention_bias=True, mlp_bias=True)),
    Row("mistral", "MistralForCausalLM", llama_like(sliding_window=4)),
    Row("ministral3", "Ministral3ForCausalLM", llama_like(
        sliding_window=4, rope_parameters={
            "rope_type": "yarn", "rope_theta": 80.0, "factor": 4.0, "beta_fast": 32.0,
            "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4, "llama_4_scaling_beta": 0.1}),
        "queries grow with their position"),
    Row("qwen2", "Qwen2ForCausalLM", _WIDTHLESS),
    Row("qwen3", "Qwen3ForCausalLM", llama_like(attention_bias=True), seed=1),
    Row("gemma", "GemmaForCausalLM", llama_like(tie_word_embeddings=True, attention_bias=True)),
    Row("gemma2", "Gemma2ForCausalLM", {
        **_GEMMA, "layer_types": windows("s", "f"), "attention_bias": True,
        "attn_logit_softcapping": 2.5, "final_logit_softcapping": 3.0}),
    Row("gemma3", "Gemma3ForCausalLM", {
        **_GEMMA, "num_hidden_layers": 3, "layer_types": windows("s", "f", "s"),
        "attention_bias": True,
        "rope_parameters": {"sliding_attention": rope(20.0), "full_attention": rope(400.0)}}),
    Row("vaultgemma", "VaultGemmaForCausalLM", {
        **_GEMMA, "layer_types": windows("s", "f"), "attention_bias": True,
        "attn_logit_softcapping": 2.5, "final_logit_softcapping": 3.0}),
    Row("gemma4_text", "Gemma4ForCausalLM", {
        **without(_GEMMA, "query_pre_attn_scalar", "rope_parameters"), "num_hidden_layers": 3,
        "layer_types": windows("s", "f", "f"), "attention_bias": True,
        "final_logit_softcapping": 3.0, "vocab_size_per_layer_input": 48,
        "hidden_size_per_layer_input": 8,
        "rope_parameters": {
            "sliding_attention": rope(20.0),
            "full_attention": {"rope_type": "proportional", "rope_theta": 400.0,
                               "partial_rotary_factor": 0.25}}},
        "embeddings and gates of each layer's own"),
    Row("phi3", "Phi3ForCausalLM", _WIDTHLESS, "fused qkv and gate-up"),
    Row("phi3-window", "Phi3ForCausalLM", {
        **_WIDTHLESS, "sliding_window": 4, "rope_parameters": rope(partial=0.5)}, seed=1),
    Row("olmo2", "Olmo2ForCausalLM", {**_WIDTHLESS, "attention_bias": True},
        "norms after the sublayers; q and k normalised over all heads"),
    Row("olmo3", "Olmo3ForCausalLM", {
        **without(_WIDTHLESS, "rope_parameters"), "attention_bias": True, "sliding_window": 4,
        "layer_types": windows("s", "f"),
        "rope_parameters": {"sliding_attention": rope(20.0), "full_attention": rope(400.0)}}),
    Row("granite", "GraniteForCausalLM", {
        **_WIDTHLESS, "attention_bias": True, "mlp_bias": True, "embedding_multiplier": 1.7,
        "logits_scaling": 1.3, "residual_multiplier": 0.6, "attention_multiplier": 0.4}),
    Row("glm", "GlmForCausalLM", llama_like(
        attention_bias=True, rope_parameters=rope(partial=0.5)), "fused gate-up"),
    Row("glm4", "Glm4ForCausalLM", llama_like(
        attention_bias=True, rope_parameters=rope(partial=0.5)), "four norms a layer"),
    Row("smollm3", "SmolLM3ForCausalLM", {
        **_WIDTHLESS, "attention_bias": True, "mlp_bias": True, "no_rope_layers": [1, 0],
        "no_rope_layer_interval": 2}, "the second layer has no positions"),
    Row("exaone4", "Exaone4ForCausalLM", llama_like(
        sliding_window=4, sliding_window_pattern=2, layer_types=windows("s", "f")),
        "norms after the sublayers; rotary in the sliding layers alone"),
    Row("apertus", "ApertusForCausalLM", {**_WIDTHLESS, "attention_bias": True},
        "xIELU; q and k norms"),
    Row("arcee", "ArceeForCausalLM", llama_like(attention_bias=True, mlp_bias=True),
        "ReLU squared"),
    Row("seed_oss", "SeedOssForCausalLM", llama_like(
        attention_bias=True, attention_out_bias=True, mlp_bias=True, attention_dropout=0.0,
        residual_dropout=0.0)),
    Row("hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM", llama_like(attention_bias=True),
        "q and k norms after the rotation"),
    Row("ernie4_5", "Ernie4_5ForCausalLM", llama_like(use_bias=True), "interleaved rotary"),
    Row("nanochat", "NanoChatForCausalLM", {
        **_WIDTHLESS, "attention_bias": True, "final_logit_softcapping": 3.0},
        "norms without weights; ReLU squared"),
    Row("bitnet", "BitNetForCausalLM", {**_WIDTHLESS, "attention_bias": True},
        "unquantised: sub-norms inside attention and MLP"),
    Row("helium", "HeliumForCausalLM", llama_like(
        hidden_size=32, attention_bias=True, mlp_bias=True), unbootable=_UNKNOWN),
    Row("biogpt", "BioGptForCausalLM", {
        "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
        "intermediate_size": 40, "max_position_embeddings": 64, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "layer_norm_eps": 1e-3, **SPECIAL},
        unbootable=_UNKNOWN),
    Row("youtu", "YoutuForCausalLM", {
        **without(llama_like(), "head_dim"), "num_key_value_heads": 4, "kv_lora_rank": 12,
        "q_lora_rank": 14, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 10,
        "attention_bias": True}, "latent attention (MLA)"),
    Row("hrm_text", "HrmTextForCausalLM", {
        **without(llama_like(), "num_key_value_heads"), "num_layers_per_stack": 1, "H_cycles": 2,
        "L_cycles": 2, "num_hidden_layers": 6, "L_bp_cycles": [2], "attention_bias": True,
        "mlp_bias": True, "embedding_scale": 2.0}, "layers run several times"),
)  # fmt: skip
