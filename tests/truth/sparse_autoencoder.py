"""A sparse autoencoder built as SAELens builds them, and its relevance written out by hand."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

Kind = Literal["relu", "jumprelu", "topk", "gated"]
Error = Literal["none", "constant", "carrying"]
KINDS: tuple[Kind, ...] = ("relu", "jumprelu", "topk", "gated")
ERRORS: tuple[Error, ...] = ("none", "constant", "carrying")
_K = 5


class SparseAutoencoder(nn.Module):
    """x [..., d] -> reconstruction [..., d], with the HookPoints that SAELens' has.

    kind: which activation. error: "constant" adds x - sae(x) computed under ``no_grad``, as
    SAELens' ``use_error_term``; "carrying" the same with its gradient.
    """

    def __init__(self, d: int, kind: Kind, error: Error = "none", d_sae: int = 30) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(len(kind))

        def parameter(*shape: int, scale: float = 1.0) -> nn.Parameter:
            values = torch.randn(shape, generator=draw, dtype=torch.float64)
            return nn.Parameter((scale * values).float())

        self.kind: Kind = kind
        self.error: Error = error
        self.W_enc, self.W_dec = parameter(d, d_sae, scale=0.4), parameter(d_sae, d, scale=0.4)
        self.b_enc, self.b_dec = parameter(d_sae, scale=0.3), parameter(d, scale=0.3)
        self.threshold = nn.Parameter(parameter(d_sae, scale=0.3).detach().abs())
        self.r_mag, self.b_gate = parameter(d_sae, scale=0.2), parameter(d_sae, scale=0.2)
        self.hook_sae_input = HookPoint()
        self.hook_sae_acts_pre = HookPoint()
        self.hook_sae_acts_post = HookPoint()
        self.hook_sae_recons = HookPoint()
        self.hook_sae_error = HookPoint()
        self.hook_sae_output = HookPoint()

    def encode(self, x: Tensor) -> Tensor:
        centred = self.hook_sae_input(x) - self.b_dec
        if self.kind == "gated":
            pre = centred @ (self.W_enc * self.r_mag.exp()) + self.b_enc
            pre = self.hook_sae_acts_pre(pre)
            active = (centred @ self.W_enc + self.b_gate > 0).to(pre.dtype)
            return self.hook_sae_acts_post(active * torch.relu(pre))
        pre = self.hook_sae_acts_pre(centred @ self.W_enc + self.b_enc)
        if self.kind == "topk":
            values, indices = torch.topk(pre, _K, dim=-1, sorted=False)
            acts = torch.zeros_like(pre)
            acts.scatter_(-1, indices, values.relu())
        else:
            acts = torch.relu(pre)
            if self.kind == "jumprelu":
                acts = acts * (pre > self.threshold).to(acts.dtype)
        return self.hook_sae_acts_post(acts)

    def decode(self, acts: Tensor) -> Tensor:
        return self.hook_sae_recons(acts @ self.W_dec + self.b_dec)

    def forward(self, x: Tensor) -> Tensor:
        out = self.decode(self.encode(x))
        if self.error == "constant":
            with torch.no_grad():
                error = self.hook_sae_error(x - self.decode(self.encode(x)))
            out = out + error
        elif self.error == "carrying":
            out = out + self.hook_sae_error(x - out)
        return self.hook_sae_output(out)

    @torch.no_grad()
    def ratio(self, pre: Tensor, centred: Tensor) -> Tensor:
        """f(x)/x of each feature: 1 where it is on, 0 where it is off."""
        on = pre > 0
        if self.kind == "jumprelu":
            on &= pre > self.threshold
        elif self.kind == "topk":
            on &= pre >= pre.sort(-1, descending=True).values[..., _K - 1 : _K]
        elif self.kind == "gated":
            on &= centred @ self.W_enc + self.b_gate > 0
        return on.to(pre.dtype)

    def written(self, x: Tensor) -> Tensor:
        """The stop-gradient form: every feature is its pre-activation times a constant."""
        W_enc, W_dec, b_enc, b_dec = (
            p.detach() for p in (self.W_enc, self.W_dec, self.b_enc, self.b_dec)
        )
        centred = x - b_dec
        scale = self.r_mag.detach().exp() if self.kind == "gated" else 1.0
        pre = centred @ (W_enc * scale) + b_enc
        out = (pre * self.ratio(pre, centred)) @ W_dec + b_dec
        if self.error == "none":
            return out
        error = x - out
        return out + (error.detach() if self.error == "constant" else error)
