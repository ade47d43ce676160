"""Tokenizers of the forms that models have, trained on a few sentences, offline, and booted.

Each is built with the ``tokenizers`` library as the models named have it: normalizer,
pre-tokenizer, model, post-processor and decoder. Each has added tokens of every kind, and each
model has five more logits than its tokenizer has tokens.

- ``FORMS``: the names. ``tokenizer(name)``: as Hugging Face loads it. ``boot(name)``: a tiny
  random GPT-2 with it as a TransformerBridge. Both are made once a session.
- ``TEXTS``: prompts of many kinds; the tokenizers were trained on all but the last ones, whose
  characters byte-level tokenizers write with several tokens.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from truth import families

UNNAMED = 5
_KNOWN = [
    "The capital of France is Paris, and the going is singing.",
    " a leading space",
    "  two leading spaces, and two trailing  ",
    "trailing ",
    "",
    " ",
    "     ",
    "\n",
    "a\n\nb\n \n\tc\t\td\r\n",
    "def f(x):\n    return x  # done\n",
    "naïve café, Zürich; Ω≈ç√∫ é e\u0301",
    "你好，世界！我们在北京。",
    "日本語のテキストと한국어 텍스트",
    "emoji 🎉🎊 family 👩‍👩‍👧‍👦 flag 🇩🇪 skin 👍🏽",
    "rare 𓀀𓁐 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ꙮ \u200b zero\u00a0width",
    "\ufffd is a character, ▁ and Ġ and ## too",
    "<0xE2> and id:5 as text, </s> <pad>",
    "<s>special<added> tokens <left> in <right> the <both> middle <word> here",
    "x" * 50,
    "don't can't we've I'm it's do not . , ! ?",
]
TEXTS = [
    *_KNOWN,
    "天地玄黄 🦀🧪 and ሰላም, Привет; ܫܠܡܐ\n𒐫𒐫 end",
    "🦀",
    "ж🦀 ж",
]
_CORPUS = [
    *_KNOWN,
    "the going ing ing sing Paris Paris paris the the there then go going gone singing king",
    "a an and are as at be by for from has he in is it its of on that to was were will with",
    "    return x\n        if y:\n            pass\n" * 3,
    "你好 世界 北京 日本 日本語 한국어 café naïve Zürich été être 🎉 🎉🎉",
]
_SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _core(name: str) -> Tokenizer:
    return {
        "gpt2": _gpt2,
        "prefix-space": _prefix_space,
        "qwen": _qwen,
        "llama3": _llama3,
        "llama2": _llama2,
        "gemma": _gemma,
        "t5": _t5,
        "unigram-bytes": _unigram_bytes,
        "bert": _bert,
        "clip": _clip,
        "words": _words,
    }[name]()


FORMS = (
    "gpt2",
    "qwen",
    "llama3",
    "llama2",
    "gemma",
    "t5",
    "unigram-bytes",
    "bert",
    "clip",
    "words",
    "prefix-space",
)


def _byte_level(core: Tokenizer, size: int = 700) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=_SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    core.train_from_iterator(_CORPUS, trainer)
    core.decoder = decoders.ByteLevel()
    return core


def _gpt2() -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _byte_level(core)


_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split() -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _prefix_space() -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return _byte_level(core)


def _qwen() -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = _split()
    return _byte_level(core, 900)


def _llama3() -> Tokenizer:
    core = Tokenizer(models.BPE(ignore_merges=True))
    core.pre_tokenizer = _split()
    core = _byte_level(core, 600)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return core


def _sentencepiece_bpe(core: Tokenizer, size: int) -> tuple[dict[str, int], Any]:
    """Vocabulary and merges of a BPE with bytes, as SentencePiece orders them."""
    import json

    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False, limit_alphabet=120)
    core.train_from_iterator(_CORPUS, trainer)
    model = json.loads(core.to_str())["model"]
    pieces = [*_SPECIAL, *_BYTES]
    known = set(pieces)
    pieces += [p for p in model["vocab"] if p not in known]
    return {p: i for i, p in enumerate(pieces)}, [tuple(pair) for pair in model["merges"]]


def _llama2() -> Tokenizer:
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    vocabulary, merges = _sentencepiece_bpe(core, 700)
    # Runs of spaces, as the vocabulary of Llama 2 has them.
    for run in ("▁▁", "▁▁▁▁"):
        vocabulary.setdefault(run, len(vocabulary))
    merges += [("▁", "▁"), ("▁▁", "▁▁")]
    core = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    core.normalizer = normalizers.Sequence(steps)
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return core


def _gemma() -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    vocabulary, merges = _sentencepiece_bpe(core, 700)
    vocabulary.setdefault("\n", len(vocabulary))
    core = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return core


def _t5() -> Tokenizer:
    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=500, special_tokens=_SPECIAL, unk_token="<unk>", show_progress=False
    )
    core.train_from_iterator(_CORPUS, trainer)
    core.decoder = decoders.Metaspace(prepend_scheme="always")
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    return core


def _unigram_bytes() -> Tokenizer:
    import json

    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>", show_progress=False)
    core.train_from_iterator(_CORPUS[:10], trainer)
    learnt = [tuple(p) for p in json.loads(core.to_str())["model"]["vocab"]]
    fixed = [(p, 0.0) for p in _SPECIAL] + [(p, -20.0) for p in _BYTES]
    known = {p for p, _ in fixed}
    pieces = fixed + [(p, s) for p, s in learnt if p not in known]
    core = Tokenizer(models.Unigram(pieces, unk_id=3, byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return core


def _bert() -> Tokenizer:
    core = Tokenizer(models.WordPiece(unk_token="<unk>"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=500, special_tokens=_SPECIAL, show_progress=False
    )
    core.train_from_iterator(_CORPUS, trainer)
    core.decoder = decoders.WordPiece(prefix="##")
    core.post_processor = processors.BertProcessing(("</s>", 2), ("<s>", 1))
    return core


def _clip() -> Tokenizer:
    core = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=_SPECIAL, show_progress=False, end_of_word_suffix="</w>"
    )
    core.train_from_iterator(_CORPUS, trainer)
    core.decoder = decoders.BPEDecoder(suffix="</w>")
    return core


def _words() -> Tokenizer:
    words = dict.fromkeys(word for text in _CORPUS for word in text.split())
    core = Tokenizer(
        models.WordLevel(
            {p: i for i, p in enumerate(dict.fromkeys([*_SPECIAL, *words]))}, unk_token="<unk>"
        )
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return core


def _added(core: Tokenizer) -> None:
    core.add_special_tokens(
        [
            AddedToken("<|im_start|>", special=True, normalized=False),
            AddedToken("<both>", special=True, lstrip=True, rstrip=True),
            AddedToken("<｜fullwidth▁bar｜>", special=True, normalized=False),
        ]
    )
    core.add_tokens(
        [
            AddedToken("<added>", normalized=False),
            AddedToken("<left>", lstrip=True, normalized=False),
            AddedToken("<right>", rstrip=True, normalized=False),
            AddedToken("<word>", single_word=True),
            AddedToken("New York", normalized=True),
            AddedToken(" the", normalized=False),
            AddedToken("   ", normalized=False),
            AddedToken("\n\n\n", normalized=False),
            AddedToken("日本国", normalized=False),
            AddedToken("café£", normalized=False),
            AddedToken("id:5", normalized=False),
            AddedToken("id:7 x", normalized=False),
            AddedToken("▁▁▁▁▁▁▁", normalized=False),
            AddedToken("\u200b\u200d", normalized=False),
            AddedToken("end ", normalized=False),
        ]
    )


@functools.cache
def saved(name: str) -> Path:
    """The session's directory of a model with this tokenizer, written on first use."""
    core = _core(name)
    _added(core)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", model_max_length=256, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    folder = families._scratch() / f"tokenizer-{name}"
    config = transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, n_positions=256, vocab_size=len(fast) + UNNAMED,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@functools.cache
def boot(name: str) -> Any:
    """A model with this tokenizer as a TransformerBridge on the CPU; one a session."""
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(str(saved(name)), device="cpu", dtype=torch.float32)


def tokenizer(name: str) -> Any:
    """The tokenizer as the booted model has it."""
    return boot(name).tokenizer
