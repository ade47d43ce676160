"""Making, saving and booting the models of the zoo, once a session and only when asked.

Weights are drawn as float32 numbers from a fixed seed, so that the float64 model holds exactly
the float32 model's weights; the Hugging Face hub is never contacted.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers

from . import dense, other, sparse
from .row import BOS, VOCAB, Row

ROWS: dict[str, Row] = {row.name: row for row in (*dense.ROWS, *sparse.ROWS, *other.ROWS)}

# Parameters that are no matrices of weights, and live near the values their class gives them.
_NEAR_INITIAL = re.compile(r"A_log|dt_bias|time_(decay|first|mix)|recurrent_param|\.D$|alpha_[pn]")
_BUFFERS = re.compile(r"correction_bias|layer_scalar|expert_bias")


def make_config(name: str) -> Any:
    """The Hugging Face configuration of a row; KeyError for an unknown name."""
    row = ROWS[name]
    return getattr(transformers, row.model).config_class(**row.kwargs)


def _noise(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(like.shape, generator=generator)


@torch.no_grad()
def _randomise(model: Any, seed: int) -> None:
    """Random float32 values for everything learned; norms about neutral, biases far from 0."""
    generator = torch.Generator().manual_seed(seed)
    norms = {
        id(parameter)
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        for parameter in module.parameters(recurse=False)
    }
    for key, parameter in model.named_parameters():  # yields tied weights once
        if not parameter.requires_grad:  # a table computed from its class's formula
            continue
        noise = _noise(parameter, generator)
        if _NEAR_INITIAL.search(key):
            value = parameter.float() + 0.2 * noise
        elif id(parameter) in norms and key.endswith("weight"):
            neutral = parameter.float().round()  # 1, or 0 where the class computes 1 + weight
            value = neutral + 0.3 * noise
        elif key.endswith(("embed_tokens.weight", "wte.weight", "word_embeddings.weight")):
            value = 0.6 * noise
        else:
            value = 0.3 * noise
        parameter.copy_(value)
    for key, buffer in model.named_buffers():
        if _BUFFERS.search(key):
            buffer.copy_(buffer.float() + 0.2 * _noise(buffer, generator))


def make_hf(name: str, dtype: torch.dtype = torch.float64, seed: int | None = None) -> Any:
    """A fresh random Hugging Face model in evaluation mode, eager attention, on the CPU."""
    model_class = getattr(transformers, ROWS[name].model)
    seed = ROWS[name].seed if seed is None else seed
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # In its final dtype from the start: Module.to() would keep buffers rounded to float32.
        model = model_class._from_config(
            make_config(name), attn_implementation="eager", dtype=dtype
        )
    _randomise(model, seed)
    return model.eval()


@functools.cache
def _scratch() -> Path:
    path = Path(tempfile.mkdtemp(prefix="tiny_zoo_"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@functools.cache
def saved(name: str, seed: int | None = None) -> Path:
    """The session's directory of a row (float32 weights and tokenizer), written on first use."""
    from truth.families import make_tokenizer

    directory = _scratch() / f"{name}-{seed}"
    model = make_hf(name, torch.float32, seed)
    model.save_pretrained(directory)
    if name == "switch_transformers":  # TransformerLens asks for this format alone
        torch.save(model.state_dict(), directory / "pytorch_model.bin")
    config = directory / "config.json"
    settings = json.loads(config.read_text("utf-8"))
    settings["architectures"] = [ROWS[name].architecture or ROWS[name].model]
    config.write_text(json.dumps(settings), "utf-8")
    make_tokenizer().save_pretrained(directory)
    return directory


@functools.cache
def boot(name: str, dtype: torch.dtype = torch.float32, seed: int | None = None) -> Any:
    """A row as a TransformerBridge on the CPU, booted from disk; one per session.

    Raises ValueError for a model with a vision or audio tower: TransformerLens 4.3 runs
    ``pip install torchvision`` while it boots one, which can exchange torch itself.
    """
    towers = {"vision_config", "audio_config"} & set(make_config(name).to_dict())
    if towers:
        raise ValueError(f"{name} has {sorted(towers)}: TransformerLens would run pip to boot it")
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(str(saved(name, seed)), device="cpu", dtype=dtype)


@functools.cache
def hf_model(name: str, dtype: torch.dtype = torch.float64, seed: int | None = None) -> Any:
    """A row as a Hugging Face model with the weights that ``boot`` has; one per session."""
    return make_hf(name, dtype, seed)


def random_tokens(length: int = 8, seed: int = 1) -> torch.Tensor:
    """[1, length] token ids: bos, then any but special tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCAB, (1, length), generator=generator)
    ids[:, 0] = BOS
    return ids
