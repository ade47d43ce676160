"""What is expected of each family of the zoo, written down so that no change passes unnoticed."""

from __future__ import annotations

# Relevance and graph are right.
COVERED: tuple[str, ...] = (
    "gpt2", "gpt2-by-layer", "gpt_neo", "gptj", "codegen", "gpt_neox", "gpt_neox-sequential",
    "gpt_bigcode", "openai_gpt", "opt", "bloom", "bloom-residual", "falcon",
    "falcon-new-one-kv", "falcon-alibi", "mpt", "xglm", "phi", "stablelm", "stablelm-parallel",
    "stablelm-qk-norm", "starcoder2", "starcoder2-window", "nemotron", "jais2", "cohere",
    "cohere-qk-norm", "cohere2", "olmo", "olmo-clipped", "modernbert_decoder", "llama",
    "mistral", "ministral3", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "vaultgemma",
    "phi3", "phi3-window", "olmo2", "olmo3", "granite", "glm", "glm4", "smollm3", "exaone4",
    "apertus", "arcee", "seed_oss", "hunyuan_v1_dense", "ernie4_5", "nanochat", "bitnet",
    "youtu", "mixtral", "phimoe", "qwen2_moe", "qwen2_moe-mixed", "qwen3_moe", "qwen3_moe-raw",
    "olmoe", "flex_olmo", "granitemoe", "granitemoehybrid-attention", "jetmoe", "gpt_oss",
    "deepseek_v2", "deepseek_v2-groups", "deepseek_v3", "glm4_moe", "glm4_moe_lite",
    "glm_moe_dsa", "ernie4_5_moe", "minimax_m2", "afmoe", "laguna", "llama4_text",
    "gemma4_text-moe", "bert", "bert-decoder", "roberta",
)  # fmt: skip

# Relevance is right and the graph refused: name -> what the refusal names.
NO_GRAPH: dict[str, str] = {}

# No relevance at all: name -> what the refusal names.
REFUSED: dict[str, str] = {
    "opt-post-norm": "another shape",
    "gemma4_text": "Gemma4TextScaledWordEmbedding",
    "hrm_text": "HrmTextForCausalLM",
    "deepseek_v4": "DeepseekV4HyperConnection",
    "bart": "encoder-decoder model",
    "mbart": "encoder-decoder model",
    "blenderbot": "encoder-decoder model",
    "pegasus": "encoder-decoder model",
    "marian": "encoder-decoder model",
    "m2m_100": "encoder-decoder model",
    "led": "encoder-decoder model",
    "t5": "encoder-decoder model",
    "t5-gated": "encoder-decoder model",
    "mt5": "encoder-decoder model",
    "longt5": "encoder-decoder model",
    "switch_transformers": "encoder-decoder model",
    "t5gemma": "encoder-decoder model",
    "mamba": "MambaMixer",
    "falcon_mamba": "FalconMambaMixer",
    "mamba2": "Mamba2Mixer",
    "rwkv": "RwkvSelfAttention",
    "jamba": "JambaMambaMixer",
    "bamba": "BambaMixer",
    "granitemoehybrid": "GraniteMoeHybridMambaLayer",
    "falcon_h1": "FalconH1Mixer",
    "nemotron_h": "NemotronHMamba2Mixer",
    "zamba2": "Zamba2MambaMixer",
    "lfm2": "Lfm2ShortConv",
    "lfm2_moe": "Lfm2MoeShortConv",
    "recurrent_gemma": "RecurrentGemmaDecoderLayer",
    "qwen3_next": "Qwen3NextGatedDeltaNet",
    "qwen3_5_text": "Qwen3_5GatedDeltaNet",
    "qwen3_5_moe_text": "Qwen3_5MoeGatedDeltaNet",
    "olmo_hybrid": "OlmoHybridGatedDeltaNet",
}
