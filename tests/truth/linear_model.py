"""A model made linear in every activation, where patching has an exact answer.

GPT-2 with ReLU neurons that are always on, attention patterns and norm denominators held at fixed
values by hooks. Whatever is patched, the metric moves along a straight line.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from truth.families import fresh


def linear_model() -> Any:
    """GPT-2 in float64 whose neurons never switch off."""
    model = fresh("gpt2-relu", torch.float64)
    with torch.no_grad():
        for block in model.original_model.transformer.h:
            block.mlp.c_fc.bias.fill_(20.0)
            block.mlp.c_fc.weight.mul_(0.03)
            block.mlp.c_proj.weight.mul_(0.2)
    return model


@contextmanager
def frozen(model: Any, seed: int = 3, *, causal: bool = False) -> Iterator[None]:
    """Patterns and norm denominators at values that depend on no input.

    Patterns have weights on later positions too, unless they are to be causal.

    ``ln1`` has one denominator for all positions, also where TransformerLens calls the wrapped
    norm on a stream forked per head.
    """
    generator = torch.Generator().manual_seed(seed)
    values: dict[str, Tensor] = {}

    def fixed(name: str) -> Any:
        def hook_fn(tensor: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
            if name not in values:
                shape = (1, 1) if "ln1" in name else tensor.shape[1:]
                drawn = torch.rand(shape, generator=generator, dtype=tensor.dtype) + 0.5
                drawn = drawn.tril() if causal and "pattern" in name else drawn
                values[name] = drawn / drawn.sum(-1, keepdim=True) if "pattern" in name else drawn
            return values[name] + 0.0 * tensor  # on the graph, or no gradient could be read there

        return hook_fn

    def forked(name: str) -> Any:
        def torch_hook(module: Any, args: tuple[Tensor], output: Tensor) -> Tensor:  # noqa: ARG001
            centred = args[0] - args[0].mean(-1, keepdim=True)
            return centred / values[name].flatten() * module.weight + module.bias

        return torch_hook

    def neurons_on(tensor: Tensor, hook: Any) -> None:  # noqa: ARG001
        assert (tensor > 0).all(), "a neuron switched off: the model is not linear"

    blocks = [f"blocks.{i}." for i in range(model.cfg.n_layers)]
    norms = [f"{b}{ln}.hook_scale" for b in blocks for ln in ("ln1", "ln2")]
    names = [*norms, "ln_final.hook_scale", *(f"{b}attn.hook_pattern" for b in blocks)]
    hooks = [(name, fixed(name)) for name in names]
    hooks += [(f"{b}mlp.in.hook_out", neurons_on) for b in blocks]
    with ExitStack() as stack:
        for i, block in enumerate(model.blocks):
            norm = block.ln1.original_component
            handle = norm.register_forward_hook(forked(f"blocks.{i}.ln1.hook_scale"))
            stack.callback(handle.remove)
        stack.enter_context(model.hooks(fwd_hooks=hooks))
        yield
