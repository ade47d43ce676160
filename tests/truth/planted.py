"""Attention models wired by hand: the circuit behind every answer is known, because it was planted.

Two tasks on prompts of a BOS and distinct letters:

- "lookup" (one block): one letter of the prompt is of the class of values; the last token asks
  for it, a head finds it and copies it to the logits.
- "induction" (two blocks): ... A B ... A → B. In block 0 a head at B copies the letter before it
  (A) beside B; in block 1 a head at the last A looks for a position that has A beside it and
  copies what stands there (B) to the logits.

Beside the circuit there are heads at least as strong that do something else: look two or three
letters back, or match a letter with itself, and write where the answer's two logits do not read
(for this Δℓ they are idle). All weights carry a little random noise. With ``mlp`` the
copied letter reaches the logits only through one neuron of a gated MLP.

How they are wired: ``planted_wires.py``.
"""

from __future__ import annotations

import functools
import math
import tempfile
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from truth.families import BOS, SPECIAL, make_tokenizer
from truth.planted_wires import (
    ASK,
    CONST,
    D_HEAD,
    D_MLP,
    D_MODEL,
    FIRST,
    HEADS,
    LETTERS,
    PLACES,
    PLANS,
    POS,
    THETA,
    VALUES,
    Plan,
    at,
    wired,
)


@dataclass(frozen=True)
class Case:
    """A prompt and what decides it.

    tokens: [1, pos]; corrupted: the same with every letter another. target, contrast: ids.
    truth: positions. heads: (layer, head, position). edges: (layer, source, target).
    neurons: (layer, position, neuron).
    """

    tokens: Tensor
    corrupted: Tensor
    target: int
    contrast: int
    truth: frozenset[int]
    heads: frozenset[tuple[int, int, int]]
    edges: frozenset[tuple[int, int, int]]
    neurons: frozenset[tuple[int, int, int]] = field(default_factory=frozenset)


# ---------------------------------------------------------------- models


def _config(plan: Plan) -> Any:
    if plan.family == "gpt2":
        return transformers.GPT2Config(
            n_embd=HEADS * D_HEAD, n_layer=plan.layers, n_head=HEADS, n_inner=D_MLP,
            n_positions=PLACES, activation_function="gelu_new", tie_word_embeddings=False,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **SPECIAL,
        )  # fmt: skip
    kind = {"llama": transformers.LlamaConfig, "qwen3": transformers.Qwen3Config}[plan.family]
    return kind(
        hidden_size=D_MODEL, intermediate_size=D_MLP, num_hidden_layers=plan.layers,
        num_attention_heads=HEADS, num_key_value_heads=plan.kv_heads, head_dim=D_HEAD,
        max_position_embeddings=64, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": THETA}, **SPECIAL,
    )  # fmt: skip


def _wide(x: Tensor, width: int, *dims: int) -> Tensor:
    """Zeros appended along residual dimensions, where the model is wider than the wiring."""
    for dim in dims:
        shape = list(x.shape)
        shape[dim] = width - shape[dim]
        x = torch.cat([x, torch.zeros(shape)], dim)
    return x


def _copy(parameter: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(value)


# Length of a letter's state where each norm reads it; norms are then about neutral.
_LENGTHS = {"lookup": (2.0**0.5, 2.0), "induction": (2.0**0.5, 5.0**0.5, 3.0)}


def make(plan: Plan) -> Any:
    """The planted Hugging Face model, float32, in evaluation mode."""
    model = transformers.AutoModelForCausalLM.from_config(
        _config(plan), attn_implementation="eager", dtype=torch.float32
    )
    for parameter in model.parameters():
        _copy(parameter, torch.zeros(()))
    embed, unembed = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    width = embed.shape[1]
    letters = range(FIRST, FIRST + LETTERS)
    table = torch.zeros(embed.shape[0], width)
    table[letters, torch.arange(LETTERS)] = 1.0
    table[:, CONST] = 1.0
    _copy(embed, table)
    read = torch.zeros(unembed.shape[0], width)
    read[letters, torch.arange(LETTERS) + at("OUT").start] = 8.0
    _copy(unembed, read)
    lengths = _LENGTHS[plan.task]
    install = _install_gpt2 if plan.family == "gpt2" else _install_llama
    install(model, plan, [length / math.sqrt(width) for length in lengths])
    return model.eval()


def _install_llama(model: Any, plan: Plan, gains: list[float]) -> None:
    for layer, (block, wires) in enumerate(zip(model.model.layers, wired(plan), strict=True)):
        attention, mlp = block.self_attn, block.mlp
        _copy(attention.q_proj.weight, wires.q.flatten(0, 1))
        _copy(attention.k_proj.weight, wires.k.flatten(0, 1))
        _copy(attention.v_proj.weight, wires.v.flatten(0, 1))
        _copy(attention.o_proj.weight, wires.o.flatten(1))
        _copy(mlp.gate_proj.weight, wires.gate)
        _copy(mlp.up_proj.weight, wires.up)
        _copy(mlp.down_proj.weight, wires.down)
        _copy(block.input_layernorm.weight, torch.tensor(gains[layer]))
        _copy(block.post_attention_layernorm.weight, torch.tensor(gains[layer + 1]))
        if plan.family == "qwen3":
            _copy(attention.q_norm.weight, torch.tensor(plan.look))
            _copy(attention.k_norm.weight, torch.tensor(1.2))
        if not plan.norm:
            block.input_layernorm = nn.Identity()
            block.post_attention_layernorm = nn.Identity()
    _copy(model.model.norm.weight, torch.tensor(gains[-1]))
    if not plan.norm:
        model.model.norm = nn.Identity()


def _install_gpt2(model: Any, plan: Plan, gains: list[float]) -> None:
    body, width = model.transformer, model.config.n_embd
    places = torch.zeros(PLACES, width)
    places[:, POS : POS + PLACES] = torch.eye(PLACES)
    _copy(body.wpe.weight, places)
    more = math.sqrt(1.5)  # the position makes a state longer
    for layer, (block, wires) in enumerate(zip(body.h, wired(plan), strict=True)):
        qkv = [_wide(x.flatten(0, 1), width, 1).T for x in (wires.q, wires.k, wires.v)]
        _copy(block.attn.c_attn.weight, torch.cat(qkv, 1))
        _copy(block.attn.c_proj.weight, _wide(wires.o.flatten(1), width, 0).T)
        _copy(block.mlp.c_fc.weight, _wide(wires.up, width, 1).T)
        _copy(block.mlp.c_proj.weight, _wide(wires.down, width, 0).T)
        _copy(block.ln_1.weight, torch.tensor(gains[layer] * more))
        _copy(block.ln_2.weight, torch.tensor(gains[layer + 1] * more))
    _copy(body.ln_f.weight, torch.tensor(gains[-1] * more))


def bridged(hf: Any, name: str) -> Any:
    """A Hugging Face model with these letters as a TransformerBridge, in evaluation mode."""
    from transformer_lens.model_bridge import TransformerBridge

    with tempfile.TemporaryDirectory() as directory:
        make_tokenizer().save_pretrained(directory)
        hf.config.save_pretrained(directory)
        model = TransformerBridge.boot_transformers(directory, hf_model=hf.eval(), device="cpu")
    model.cfg.model_name = name
    return model.eval()


@functools.cache
def bridge(name: str | Plan) -> Any:
    """The planted model as a TransformerBridge; one per session."""
    plan = PLANS[name] if isinstance(name, str) else name
    return bridged(make(plan), f"planted {plan.task}")


# ---------------------------------------------------------------- prompts


def case(plan: Plan, seed: int, length: int = 11) -> Case:
    """One prompt of a task; letters, places and contrast are drawn with the seed."""
    generator = torch.Generator().manual_seed(1000 + seed)

    def pick(n: int) -> int:
        return int(torch.randint(n, (1,), generator=generator))

    last, mlp_at = length - 1, plan.layers - 1
    if plan.task == "lookup":
        fillers = torch.randint(VALUES, (length,), generator=generator)
        values = VALUES + torch.randperm(ASK - VALUES, generator=generator)
        where = 1 + pick(length - 2)
        letters = fillers.clone()
        letters[where], letters[last] = values[0], ASK
        target, contrast = int(values[0]), int(values[1])
        other = torch.randint(VALUES, (length,), generator=generator)
        truth = {where, last}
        heads = {(0, 0, last)}
        edges = {(0, where, last), (0, last, last)}
    else:
        order = torch.randperm(LETTERS, generator=generator)
        letters = torch.zeros(length, dtype=torch.long)
        letters[1:last] = order[: last - 1]
        where = 1 + pick(last - 2)
        letters[last] = letters[where]
        target, contrast = int(letters[where + 1]), int(order[last - 1])
        # None of the letters that the question is about: nothing to find, nothing to prefer.
        free = order[~torch.isin(order, torch.tensor([letters[where], target, contrast]))]
        other = free[torch.randint(len(free), (length,), generator=generator)]
        truth = {where, where + 1, last}
        heads = {(0, 0, where + 1), (1, 0, last)}
        edges = {(0, where, where + 1), (0, where + 1, where + 1), (0, last, last)}
        edges |= {(1, where + 1, last), (1, last, last)}
    tokens, corrupted = (x[None] + FIRST for x in (letters, other))
    tokens[0, 0] = corrupted[0, 0] = BOS
    neurons = {(mlp_at, last, target)} if plan.mlp else set()
    return Case(
        tokens, corrupted, target + FIRST, contrast + FIRST, frozenset(truth), frozenset(heads),
        frozenset(edges), frozenset(neurons),
    )  # fmt: skip
