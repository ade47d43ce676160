"""Tokenizers of the forms that models come with, built offline, and tiny models that have them.

Each is a small BPE trained here; what is as in the real one is its shape: normaliser,
pre-tokeniser, post-processor, special tokens and chat template.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from truth import families

CORPUS = [
    "def add(a, b):\n    return a\n\n    return a + b\n        return a\n",
    "The capital of France is Paris. The capital of Italy is Rome. 12 and 7 make 19.\n",
    "user assistant system\nreturn returning the returned value; You are a helpful assistant.\n",
] * 4
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\n\n' + m['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + m['role'] + '\n' + m['content'] "
    "+ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def _byte_level(special: list[str]) -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=420, special_tokens=special, show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    return core


def _sentencepiece(special: list[str], prefix: str) -> Tokenizer:
    """BPE over ▁ with byte fallback. prefix: "normalizer" (Llama 2), "first", or "" (Gemma)."""
    core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tail: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    spaces = normalizers.Replace(" ", "▁")
    if prefix == "first":
        core.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    elif prefix:
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
    else:
        core.normalizer = spaces
    if prefix:
        tail.append(decoders.Strip(" ", 1, 0))
    core.decoder = decoders.Sequence(tail)
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="never")
    learner.train_from_iterator(
        [line.replace("\n", "▁") for line in CORPUS],
        trainers.BpeTrainer(vocab_size=160, show_progress=False),
    )
    learned = json.loads(learner.to_str())["model"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [piece for piece in learned["vocab"] if piece not in pieces]
    merges = [tuple(pair) for pair in learned["merges"]]
    core.model = models.BPE(
        {piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>", fuse_unk=True,
        byte_fallback=True,
    )  # fmt: skip
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return core


def _bos_first(core: Tokenizer, bos: str, eos: str = "") -> Tokenizer:
    single = f"{bos} $A {eos}".strip()
    named = [(text, core.token_to_id(text)) for text in (bos, eos) if text]
    core.post_processor = processors.TemplateProcessing(
        single=single, pair=f"{single} $B", special_tokens=named
    )
    return core


def _fast(core: Tokenizer, template: str | None, **named: str) -> Any:
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, model_max_length=512, clean_up_tokenization_spaces=False, **named
    )
    tokenizer.chat_template = template
    return tokenizer


def _smollm() -> Any:
    core = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<file_sep>"])
    named = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    return _fast(core, CHATML, unk_token="<|endoftext|>", **named)


def _qwen() -> Any:
    core = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return _fast(core, CHATML, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def _gpt2() -> Any:
    end = "<|endoftext|>"
    return _fast(_byte_level([end]), None, bos_token=end, eos_token=end, unk_token=end)


def _llama2(prefix: str = "normalizer") -> Any:
    core = _bos_first(_sentencepiece(["<unk>", "<s>", "</s>"], prefix), "<s>")
    return _fast(core, LLAMA2, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _llama3() -> Any:
    special = [
        "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
        "<|eot_id|>",
    ]  # fmt: skip
    core = _bos_first(_byte_level(special), "<|begin_of_text|>")
    return _fast(core, LLAMA3, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")


def _gemma() -> Any:
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    core = _bos_first(_sentencepiece(special, ""), "<bos>")
    return _fast(
        core, GEMMA, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def _ends() -> Any:
    """Puts BOS before and EOS after a text."""
    core = _bos_first(_byte_level(["<s>", "</s>"]), "<s>", "</s>")
    return _fast(core, None, bos_token="<s>", eos_token="</s>")


def _eos_only() -> Any:
    """Puts EOS after a text, and has no BOS."""
    core = _byte_level(["<pad>", "</s>"])
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A $B </s>", special_tokens=[("</s>", 1)]
    )
    return _fast(core, None, eos_token="</s>", pad_token="<pad>")


# The form, and the family of the tiny model that has it.
FORMS: dict[str, tuple[Callable[[], Any], str]] = {
    "smollm": (_smollm, "llama"),
    "qwen": (_qwen, "qwen3"),
    "gpt2": (_gpt2, "gpt2"),
    "llama2": (_llama2, "llama"),
    "llama2-first": (functools.partial(_llama2, "first"), "llama"),
    "llama3": (_llama3, "llama"),
    "gemma": (_gemma, "gemma2"),
    "ends": (_ends, "llama"),
    "eos-only": (_eos_only, "llama"),
    "qwen-bos": (_llama3, "qwen3"),  # a tokenizer that begins with BOS, a family that does not
}


@functools.cache
def folder(form: str) -> Path:
    """A Hugging Face directory with the form's tokenizer and a random model, float32 weights."""
    make, family = FORMS[form]
    tokenizer = make()
    path = families._scratch() / f"form-{form}"
    config = families.make_config(family)
    config.vocab_size = len(tokenizer)
    for name in ("bos", "eos", "pad"):
        setattr(config, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
    for name in ("max_position_embeddings", "n_positions"):
        if hasattr(config, name):
            setattr(config, name, 512)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    families._randomise(model, 0)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def booted(form: str) -> Any:
    """The form's model as a bridge, fresh: what was said to its user is said again."""
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(str(folder(form)), device="cpu", dtype=torch.float64)


@functools.cache
def alone(form: str) -> tuple[Any, Any]:
    """Tokenizer and model as Hugging Face loads them, without TransformerLens."""
    path = folder(form)
    return (
        transformers.AutoTokenizer.from_pretrained(path),
        transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float64, attn_implementation="eager"
        ).eval(),
    )


def own_ids(form: str, text: str, bos: bool | None = None) -> list[int]:
    """Hugging Face's ids; with ``bos``, the text's own ones, behind BOS or not."""
    tokenizer, _ = alone(form)
    if bos is None:
        return list(tokenizer(text)["input_ids"])
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return [tokenizer.bos_token_id, *ids] if bos else ids


def true_logits(form: str, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return alone(form)[1](torch.tensor([ids])).logits[0, -1]
