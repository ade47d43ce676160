"""What a call may leave behind on a model: compare two snapshots with ``==``."""

from __future__ import annotations

from typing import Any

import torch

CAPS = ("attn_logit_softcapping", "final_logit_softcapping")


def _modules(model: Any) -> list[Any]:
    found = {id(m): m for root in (model, model.original_model) for m in root.modules()}
    return list(found.values())


def snapshot_of(model: Any) -> dict[str, Any]:
    """All that a context manager or a run may touch: compare two of these with ``==``.

    HookPoints' own lists, torch hooks of every module (bridged or wrapped), training flags,
    parameters' requires_grad and .grad (values and identity), and soft-cap constants with their
    type.
    """
    hooks, flags, caps, torch_hooks = {}, {}, {}, {}
    for name, point in model.hook_dict.items():
        hooks[name] = [id(h) for h in (*point.fwd_hooks, *point.bwd_hooks)]
    for i, module in enumerate(_modules(model)):
        torch_hooks[i] = (
            [id(f) for f in module._forward_hooks.values()],
            [id(f) for f in module._forward_pre_hooks.values()],
            [id(f) for f in module._backward_hooks.values()],
        )
        flags[i] = module.training
        for holder in (module, getattr(module, "config", None)):
            for cap in CAPS:
                if holder is not None and cap in vars(holder):
                    value = vars(holder)[cap]
                    caps[i, type(holder).__name__, cap] = (type(value), value)
    parameters = [
        (id(p), p.requires_grad, None if p.grad is None else (id(p.grad), p.grad.sum().item()))
        for p in model.original_model.parameters()
    ]
    return {
        "hooks": hooks,
        "torch hooks": torch_hooks,
        "training": flags,
        "soft-caps": caps,
        "parameters": parameters,
        "grad mode": torch.is_grad_enabled(),
    }
