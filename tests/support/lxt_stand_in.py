"""Writes a package that is called as lxt is, for tests of the benchmark that times it.

Its patch is AttnLRP for Llama, written from the rules: statistics of norms, and the ratio of an
activation to its input, are constants; products of two computed factors are halved, by a quarter at
queries and keys and a half at values.
"""

from __future__ import annotations

from pathlib import Path

_PATCH = '''
import warnings

import torch
from transformers import AttentionInterface


def scaled(x, factor):
    """x, with a gradient of so much."""
    return x.detach() + factor * (x - x.detach())


def norm(self, x):
    scale = torch.rsqrt((x * x).mean(-1, keepdim=True) + self.variance_epsilon)
    return self.weight * x * scale.detach()


def mlp(self, x):
    gate = self.gate_proj(x)
    return self.down_proj(scaled(gate * torch.sigmoid(gate).detach() * self.up_proj(x), 0.5))


def monkey_patch(module, patch_map=None, verbose=False):
    if {fails}:
        warnings.warn("Failed to patch LlamaMLP. Skipping...")
        return
    module.LlamaRMSNorm.forward, module.LlamaMLP.forward = norm, mlp
    fused = module.ALL_ATTENTION_FUNCTIONS["sdpa"]
    module.ALL_ATTENTION_FUNCTIONS["sdpa"] = lambda self, q, k, v, *rest, **more: fused(
        self, scaled(q, 0.25), scaled(k, 0.25), scaled(v, 0.5), *rest, **more
    )
'''


def write_lxt(folder: Path, *, fails: bool = False) -> Path:
    """The folder of a checkout; with ``fails``, its patch fails with a warning, as lxt's does."""
    package = folder / "lxt" / "efficient"
    package.mkdir(parents=True)
    (folder / "lxt" / "__init__.py").write_text("")
    (package / "__init__.py").write_text(_PATCH.replace("{fails}", str(fails)))
    return folder
