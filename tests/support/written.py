"""AttnLRP and GIM on small decoders, written out: what a user's edits inside the rules must give.

Each family's forward in plain torch, with every rule as a detached factor, and every named value
passed through ``at`` where a user's hook may change it. It shares no code with the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# HookPoints of a block that may be edited.
EDITED = ("hook_in", "ln1.hook_in", "ln1.hook_out", "attn.q.hook_out", "attn.k.hook_out",
          "attn.v.hook_out", "attn.hook_pattern", "attn.o.hook_in", "attn.hook_out", "ln2.hook_in",
          "ln2.hook_out", "mlp.in.hook_out", "mlp.out.hook_in", "mlp.hook_out",
          "hook_out")  # fmt: skip
ROTARY = ("attn.hook_rot_q", "attn.hook_rot_k", "mlp.gate.hook_out")
PLACES = {
    "gpt2": EDITED,
    "qwen3": (*EDITED, *ROTARY, "attn.q_norm.hook_in", "attn.k_norm.hook_out"),
    "gemma2": (*EDITED, *ROTARY, "ln1_post.hook_in", "ln2_post.hook_out"),
}


class Written:
    """``rules`` on a small decoder, from its state dict and configuration, in plain torch."""

    def __init__(
        self, hf: Any, edits: dict[str, Callable[[Tensor], Tensor]], rules: str = "attnlrp"
    ) -> None:
        self.gim = {"attnlrp": False, "gim": True}[rules]
        self.w = {k: v.detach() for k, v in hf.state_dict().items()}
        self.c = hf.config
        self.kind = hf.config.model_type
        self.edits = dict(edits)
        self.nodes: dict[str, Tensor] = {}

    def at(self, name: str, x: Tensor) -> Tensor:
        if name in self.edits:
            x = self.edits.pop(name)(x)
        if x.requires_grad:
            x = x.view_as(x)
            x.retain_grad()
            self.nodes[name] = x
        return x

    def norm(self, x: Tensor, key: str, name: str) -> Tensor:
        """LN-rule: the scale is detached."""
        gemma, gpt2 = self.kind.startswith("gemma"), self.kind == "gpt2"
        x = self.at(f"{name}.hook_in", x)
        c = x - x.mean(-1, keepdim=True) if gpt2 else x
        eps = self.c.layer_norm_epsilon if gpt2 else self.c.rms_norm_eps
        scale = self.at(f"{name}.hook_scale", (c.pow(2).mean(-1, keepdim=True) + eps).sqrt())
        normalized = self.at(f"{name}.hook_normalized", c / scale.detach())
        weight = self.w[f"{key}.weight"] + (1.0 if gemma else 0.0)
        y = normalized * weight
        y = y + self.w[f"{key}.bias"] if gpt2 else y
        return self.at(f"{name}.hook_out", y)

    def identity(self, x: Tensor, y: Tensor) -> Tensor:
        """Identity rule: y = x ⊙ (y/x held constant); no x of these tests is 0 unless y is. GIM has
        the gradient there."""
        if self.gim:
            return y
        ratio = torch.where(x == 0, torch.full_like(x, 0.5), y / x).detach()
        return x * ratio

    def softmax(self, scores: Tensor) -> Tensor:
        """GIM: the gradient of T · softmax(s/T), for T = 2."""
        p = scores.softmax(-1)
        if not self.gim:
            return p
        warm = 2 * (scores / 2).softmax(-1)
        return p.detach() + warm - warm.detach()

    @staticmethod
    def half(y: Tensor) -> Tensor:
        return 0.5 * y + (0.5 * y).detach()

    def cap(self, x: Tensor, cap: float | None) -> Tensor:
        return x if cap is None else self.identity(x, cap * torch.tanh(x / cap))

    def linear(self, x: Tensor, key: str) -> Tensor:
        weight = self.w[f"{key}.weight"]
        y = x @ (weight if self.kind == "gpt2" else weight.T)
        return y + self.w[f"{key}.bias"] if f"{key}.bias" in self.w else y

    def rotate(self, x: Tensor, layer: int) -> Tensor:
        settings = self.c.rope_parameters
        d, n = x.shape[-1], x.shape[1]
        del layer
        turn = settings["rope_theta"] ** (-torch.arange(0, d, 2, dtype=x.dtype) / d)
        angle = torch.outer(torch.arange(n, dtype=x.dtype), turn)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        a, b = x[..., : d // 2], x[..., d // 2 :]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def attention(self, x: Tensor, i: int) -> Tensor:
        gpt2, n = self.kind == "gpt2", x.shape[1]
        at = f"blocks.{i}.attn"
        key = f"transformer.h.{i}.attn" if gpt2 else f"model.layers.{i}.self_attn"
        if gpt2:
            d = self.c.n_embd // self.c.n_head
            q, k, v = self.linear(x, f"{key}.c_attn").chunk(3, -1)
        else:
            d = self.c.head_dim
            q, k, v = (self.linear(x, f"{key}.{p}_proj") for p in "qkv")
        q, k, v = (
            self.at(f"{at}.{p}.hook_out", t.unflatten(-1, (-1, d)))
            for p, t in zip("qkv", (q, k, v), strict=True)
        )
        if self.kind == "qwen3":
            # [batch, head, pos, d_head], the layout in which TransformerLens fires these
            q, k = (
                self.norm(t.transpose(1, 2), f"{key}.{p}_norm", f"{at}.{p}_norm").transpose(1, 2)
                for p, t in (("q", q), ("k", k))
            )
        if not gpt2:
            q, k = (
                self.at(f"{at}.hook_rot_{p}", self.rotate(t, i)) for p, t in (("q", q), ("k", k))
            )
        groups = q.shape[2] // k.shape[2]
        k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
        size = self.c.query_pre_attn_scalar if self.kind == "gemma2" else d
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(size)
        if self.kind == "gemma2":
            scores = self.cap(scores, self.c.attn_logit_softcapping)
        rows, columns = torch.arange(n)[:, None], torch.arange(n)
        hidden = columns > rows
        if self.kind == "gemma2" and self.c.layer_types[i] == "sliding_attention":
            hidden = hidden | (rows - columns >= self.c.sliding_window)
        scores = self.half(scores).masked_fill(hidden, torch.finfo(x.dtype).min)
        pattern = self.at(f"{at}.hook_pattern", self.softmax(scores))
        z = self.at(f"{at}.o.hook_in", self.half(torch.einsum("bhqk,bkhd->bqhd", pattern, v)))
        out = self.linear(z.flatten(2), f"{key}.c_proj" if gpt2 else f"{key}.o_proj")
        return self.at(f"{at}.hook_out", out)

    def mlp(self, x: Tensor, i: int) -> Tensor:
        act = torch.nn.functional.gelu if self.kind != "qwen3" else torch.nn.functional.silu
        how = {} if self.kind == "qwen3" else {"approximate": "tanh"}
        at = f"blocks.{i}.mlp"
        if self.kind == "gpt2":
            key = f"transformer.h.{i}.mlp"
            pre = self.at(f"{at}.in.hook_out", self.linear(x, f"{key}.c_fc"))
            post = self.at(f"{at}.out.hook_in", self.identity(pre, act(pre, **how)))
            return self.at(f"{at}.hook_out", self.linear(post, f"{key}.c_proj"))
        key = f"model.layers.{i}.mlp"
        gate = self.at(f"{at}.gate.hook_out", self.linear(x, f"{key}.gate_proj"))
        up = self.at(f"{at}.in.hook_out", self.linear(x, f"{key}.up_proj"))
        product = self.half(self.identity(gate, act(gate, **how)) * up)
        post = self.at(f"{at}.out.hook_in", product)
        return self.at(f"{at}.hook_out", self.linear(post, f"{key}.down_proj"))

    def run(self, ids: Tensor) -> Tensor:
        gpt2, gemma = self.kind == "gpt2", self.kind == "gemma2"
        if gpt2:
            x = self.at(
                "embed.hook_out", self.w["transformer.wte.weight"][ids].requires_grad_(True)
            )
            x = x + self.w["transformer.wpe.weight"][: ids.shape[1]]
        else:
            scale = math.sqrt(self.c.hidden_size) if gemma else 1.0
            x = self.w["model.embed_tokens.weight"][ids] * scale
            x = self.at("embed.hook_out", x.requires_grad_(True))
        for i in range(self.c.num_hidden_layers):
            at = f"blocks.{i}"
            key = f"transformer.h.{i}" if gpt2 else f"model.layers.{i}"
            first, second = {
                "gpt2": ("ln_1", "ln_2"),
                "qwen3": ("input_layernorm", "post_attention_layernorm"),
                "gemma2": ("input_layernorm", "pre_feedforward_layernorm"),
            }[self.kind]
            x = self.at(f"{at}.hook_in", x)
            out = self.attention(self.norm(x, f"{key}.{first}", f"{at}.ln1"), i)
            if gemma:
                out = self.norm(out, f"{key}.post_attention_layernorm", f"{at}.ln1_post")
            x = x + out
            out = self.mlp(self.norm(x, f"{key}.{second}", f"{at}.ln2"), i)
            if gemma:
                out = self.norm(out, f"{key}.post_feedforward_layernorm", f"{at}.ln2_post")
            x = self.at(f"{at}.hook_out", x + out)
        x = self.norm(x, "transformer.ln_f" if gpt2 else "model.norm", "ln_final")
        logits = self.at("unembed.hook_out", x @ self.w["lm_head.weight"].T)
        return self.cap(logits, self.c.final_logit_softcapping if gemma else None)


def patch(tensor: Tensor) -> Tensor:
    """Activation patching: one position (or head) takes other values; no gradient goes there."""
    out = tensor.clone()
    out[:, 1] = torch.linspace(-1.0, 1.0, out[:, 1].numel()).to(out).view_as(out[:, 1])
    return out
