"""Independent truth for any Hugging Face model, at the level of single operations.

The model's own forward runs under ``op_forms.RuleMode``, which gives every operation its rule's
gradient by a stop-gradient form; one backward pass then gives relevance at every residual-stream
site, and one more for each target position the edges between two of them. Nothing of the package
under test and nothing of TransformerLens is imported, and no family is known by name.

    oracle = OpOracle(hf_model, tokens, seed_grad, "attnlrp")
    oracle.relevance["blocks.1.hook_resid_pre"]                     # [batch, pos, d_model]
    oracle.edges("blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre")   # [target_pos, source_pos]

After a run the graph that autograd recorded is read (``audit``): a nonlinear node, or a product
of two computed factors, that the forms did not put there is an error. So an operation that the
mode never saw (a scripted function, a custom kernel) cannot pass unseen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from truth.op_forms import RULES, OpRules, RuleMode, UnknownOperationError

__all__ = ["RULES", "OpOracle", "OpRules", "UnknownOperationError"]

CAPS = ("attn_logit_softcapping", "final_logit_softcapping", "logits_soft_cap")
# Composed activations that are no class of transformers.activations.
ACTIVATION_CLASSES = frozenset({"BloomGelu"})
# Graph node -> which of its inputs are factors.
PRODUCT_NODES = {
    **dict.fromkeys(("MulBackward0", "BmmBackward0", "DivBackward0", "MmBackward0"), slice(0, 2)),
    **dict.fromkeys(("AddmmBackward0", "BaddbmmBackward0"), slice(1, 3)),
}
_LINEAR_NODES = """
    Add Sub Rsub Neg Mul Div Mm Bmm Addmm Baddbmm View Reshape ReshapeAlias UnsafeView Permute
    Transpose T Clone Expand Unsqueeze Squeeze Cat Stack Split SplitWithSizes Chunk Unbind Select
    Slice Index IndexPut IndexSelect Gather Repeat Flip ConstantPadNd MaskedFill Where Tril Triu
    ToCopy Sum Mean Topk Scatter ScatterAdd IndexAdd AsStrided Alias Cumsum Unfold Roll Convolution
    Narrow Linear ViewAsComplex ViewAsReal
"""
LINEAR_NODES = frozenset(
    f"{name}Backward{i}" for name in _LINEAR_NODES.split() for i in range(4)
) | {"CopySlices", "AccumulateGrad", "CopyBackwards"}
PROBABILITY_NODES = frozenset(
    {"SoftmaxBackward0", "SigmoidBackward0", "SoftplusBackward0", "_HotSoftmaxBackward"}
)
SHIFT_NODES = frozenset({"MaxBackward0", "AmaxBackward0"})


class OpOracle:
    """One forward and one backward pass of a Hugging Face model in evaluation mode.

    Args:
        model: with eager attention; float64 for truth.
        tokens: [batch, pos] ids.
        seed_grad: [batch, pos, vocab], the objective's gradient at the logits.
        rules: a name of ``RULES``, or an ``OpRules``.
        inputs: more of the forward's arguments (attention_mask, ...).

    Attributes:
        logits: [batch, pos, vocab].
        activation, gradient, relevance: by TransformerLens name, [batch, pos, d_model]:
            "hook_embed" (what the token embedding returns), "blocks.{l}.hook_resid_pre" and the
            last block's "hook_resid_post"; the embedding alone where there is no one stack.
        seen: how often each form was used.
    """

    def __init__(
        self, model: Any, tokens: Tensor, seed_grad: Tensor, rules: str | OpRules, **inputs: Any
    ) -> None:
        self.rules = RULES[rules] if isinstance(rules, str) else rules
        self._at: dict[str, Tensor] = {}
        mode = RuleMode(self.rules, has_softcap(model.config))
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(_ready(model))
            stack.enter_context(whole_activations(model, mode))
            stack.enter_context(self._recording(model))
            stack.enter_context(mode)
            logits = model(tokens, use_cache=False, **inputs).logits
        self.seen = dict(mode.seen)
        if replace(self.rules, attention="gradient", softmax="gradient") == RULES["relp"]:
            audit(logits.grad_fn, mode.quotients, matrix=self.rules.attention == "gradient")
        self.sites = tuple(name for name in self._at if name != "hook_embed")
        grads = torch.autograd.grad(
            (seed_grad.to(logits.dtype) * logits).sum(), tuple(self._at.values()), retain_graph=True
        )
        self.logits = logits.detach()
        self.activation = {name: x.detach() for name, x in self._at.items()}
        self.gradient = dict(zip(self._at, grads, strict=True))
        self.relevance = {name: self.activation[name] * g for name, g in self.gradient.items()}

    def node(self, site: str) -> Tensor:
        """Relevance of a site's positions, [batch, pos]."""
        return self.relevance[site].sum(-1)

    def edges(self, source: str, target: str) -> Tensor:
        """A[target_pos, source_pos] for a batch of one, over one or several blocks.

        A[j, i] = sum_d h_s[i, d] * d<g_t[j], h_t[j]> / d h_s[i, d], one backward pass for each j.
        """
        x, y, g = self._at[source], self._at[target], self.gradient[target]
        rows = []
        for j in range(y.shape[1]):
            signal = torch.zeros_like(g)
            signal[:, j] = g[:, j]
            (back,) = torch.autograd.grad(y, x, signal, retain_graph=True)
            rows.append((back * x.detach()).sum(-1)[0])
        return torch.stack(rows)

    @contextmanager
    def _recording(self, model: nn.Module) -> Iterator[None]:
        """Hooks that make the token embedding the root of all computed values and keep sites."""
        layers = decoder_layers(model)

        def embed(_module: Any, _args: Any, out: Tensor) -> Tensor:
            self._at["hook_embed"] = out.detach().requires_grad_()
            return self._at["hook_embed"]

        def enter(index: int) -> Any:
            def hook(_module: Any, args: Any, kwargs: Any) -> None:
                x = args[0] if args else kwargs["hidden_states"]
                self._at[f"blocks.{index}.hook_resid_pre"] = x

            return hook

        def leave(_module: Any, _args: Any, out: Any) -> None:
            last = f"blocks.{len(layers) - 1}.hook_resid_post"
            self._at[last] = out if isinstance(out, Tensor) else out[0]

        handles = [model.get_input_embeddings().register_forward_hook(embed)]
        for i, layer in enumerate(layers):
            handles.append(layer.register_forward_pre_hook(enter(i), with_kwargs=True))
        if layers:
            handles.append(layers[-1].register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def has_softcap(config: Any) -> bool:
    """Whether the configuration has any soft-cap."""
    return any(getattr(config, cap, None) is not None for cap in CAPS)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers whose inputs are the residual stream: the outermost list of modules.

    Empty where there is no such list, or more than one (stacks that run in turns).
    """
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    depth = min((name.count(".") for name, _ in lists), default=0)
    outermost = [m for name, m in lists if name.count(".") == depth and len(m) > 1]
    return list(outermost[0]) if len(outermost) == 1 else []


@contextmanager
def _ready(model: Any) -> Iterator[None]:
    """Parameters as constants, experts one by one, new tensors in the model's dtype; undone."""
    before_dtype = torch.get_default_dtype()
    torch.set_default_dtype(next(model.parameters()).dtype)
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    experts = getattr(model.config, "_experts_implementation_internal", None)
    try:
        for p, _ in wanted:
            p.requires_grad_(False)
        if hasattr(model.config, "_experts_implementation_internal"):
            model.config._experts_implementation_internal = "eager"
        yield
    finally:
        torch.set_default_dtype(before_dtype)
        if hasattr(model.config, "_experts_implementation_internal"):
            model.config._experts_implementation_internal = experts
        for p, before in wanted:
            p.requires_grad_(before)


def is_activation(module: nn.Module) -> bool:
    """Whether a module is one function f with f(0) = 0 of one argument."""
    from transformers import activations

    kind = type(module)
    home = kind.__module__ in (activations.__name__, "torch.nn.modules.activation")
    known = home and kind.__name__ not in ("Sigmoid", "Softmax", "Softplus")
    return known or kind.__name__ in ACTIVATION_CLASSES


@contextmanager
def whole_activations(model: nn.Module, mode: RuleMode) -> Iterator[None]:
    """Activation modules as one operation each, however they are composed."""
    found = [m for m in model.modules() if is_activation(m)]
    try:
        for module in found:
            f = module.forward
            module.__dict__["forward"] = lambda x, f=f: (
                mode.activation(f, x) if x.requires_grad and mode.rules.norm != "gradient" else f(x)
            )
        yield
    finally:
        for module in found:
            module.__dict__.pop("forward", None)


def audit(root: Any, quotients: list[Any], *, matrix: bool) -> None:
    """Raise for any node of autograd's graph that is neither linear nor a known form.

    matrix: products of two computed matrices are wanted as they are.
    """
    known = LINEAR_NODES | PROBABILITY_NODES | SHIFT_NODES
    todo, done = [root], set()
    while todo:
        node = todo.pop()
        if node in done:
            continue
        done.add(node)
        name = node.name().rpartition("::")[2]
        inputs = [parent for parent, _ in node.next_functions]
        if name not in known:
            raise UnknownOperationError(f"{name} in the graph: an operation that no rule replaced")
        plain = (matrix and name in ("BmmBackward0", "BaddbmmBackward0")) or node in quotients
        factors = inputs[PRODUCT_NODES.get(name, slice(0, 0))]
        if not plain and len(factors) == 2 and None not in factors:
            raise UnknownOperationError(f"{name} of two computed factors in the graph")
        todo.extend(parent for parent in inputs if parent is not None)
