"""An account of Δℓ under CP-LRP, from autograd alone.

Every rule of CP-LRP conserves relevance. Each operation that relevance passes is then linear in its
computed inputs, so Δℓ is the sum of (value × gradient) over everything that enters the computation:
the embeddings of tokens and positions, biases, and constants that are added anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from einops import reduce
from jaxtyping import Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...engine.reading import tap
from ...hooks.context import plan
from ...hooks.hook_rules import rules_in_hooks
from ...hooks.placement import attached, embedding_leaves, own_hooks
from ...inputs.bridge import LEAVES, bias_of, components, hook_points, module_names, public_name
from ...inputs.devices import precise
from ...rules.precision import first_gradient, plain
from ...rules.rule_sets import get_rule_set
from ...rules.threads import frozen_parameters, mine


@dataclass(frozen=True)
class ConservationAccount:
    """How Δℓ divides among all inputs and constants of the computation, in logits.

    Attributes:
        delta: Δℓ.
        tokens: Relevance of the prompt's tokens.
        positions: Relevance of position, type and other embeddings.
        biases: Relevance of all bias parameters.
        constants: Relevance of all other constants that are added to a computed value.
        flow: Σ |relevance| over the tokens, which measures how much could be lost.
    """

    delta: float
    tokens: float
    positions: float
    biases: float
    constants: float
    flow: float

    @property
    def missing(self) -> float:
        """|Δℓ − the sum of all parts|, over the larger of |Δℓ| and ``flow``."""
        total = self.tokens + self.positions + self.biases + self.constants
        return abs(self.delta - total) / max(abs(self.delta), self.flow, 1e-30)

    def __str__(self) -> str:
        parts = [f"{self.tokens:+.4f} (tokens)"]
        for name in ("positions", "biases", "constants"):
            value = getattr(self, name)
            if value != 0.0:
                parts.append(f"{value:+.4f} ({name})")
        return f"Δℓ {self.delta:+.4f} = {' '.join(parts)}"


def conservation_account(
    model: Any, tokens: Int[Tensor, "1 pos"], objective: Callable[[Tensor], Tensor]
) -> ConservationAccount:
    """Run once under "cplrp" and add up the relevance of all inputs and constants."""
    attachments, _ = plan(model, "cplrp")
    leaves: dict[str, Tensor] = {}
    biases, constants = _Biases(model), _Constants()
    with frozen_parameters(model), ExitStack() as stack:
        stack.enter_context(biases.differentiable())
        lookups = stack.enter_context(_other_embeddings(model))
        stack.enter_context(rules_in_hooks(model, get_rule_set("cplrp")))
        stack.enter_context(own_hooks(model, embedding_leaves(model, leaves)))
        stack.enter_context(constants)
        with attached(model, attachments), biases.read_at_outputs(model):
            value = objective(model(tokens))
        sources = [*leaves.values(), *lookups, *biases.parameters]
        grads = torch.autograd.grad(value, sources, first_gradient(model, value), allow_unused=True)
    n_embeddings = len(leaves) + len(lookups)
    products = [
        _product(x, g) for x, g in zip(sources[:n_embeddings], grads[:n_embeddings], strict=True)
    ]
    at_leaves = dict(zip(leaves, products[: len(leaves)], strict=True))
    of_tokens = [r for name, r in at_leaves.items() if name == LEAVES[0]]
    others = [r for name, r in at_leaves.items() if name != LEAVES[0]] + products[len(leaves) :]
    return ConservationAccount(
        delta=float(value.detach()),
        tokens=float(sum(r.sum() for r in of_tokens)),
        positions=float(sum(r.sum() for r in others)),
        biases=biases.total(grads[n_embeddings:]),
        constants=constants.total,
        flow=float(sum(r.sum(-1).abs().sum() for r in of_tokens)),
    )


def _product(x: Tensor, g: Tensor | None) -> Tensor:
    return torch.zeros(1) if g is None else precise(x.detach()) * precise(plain(g))


class _Biases:
    """The relevance of all biases of a model.

    It is bias × gradient, where the bias has a gradient. The rule of a norm module replaces the
    module's own graph, including its bias, and in compatibility mode TransformerLens computes with
    copies. The gradient is then read at the output of the module, or of the component.

    Args:
        model: The bridge.

    Attributes:
        parameters: Every bias once: one-dimensional tensors named "bias" of the wrapped modules,
            and parameters whose names end in "bias".
    """

    def __init__(self, model: Any) -> None:
        self.at_module: dict[int, float] = {}
        self.at_component: dict[int, float] = {}
        self.modules: list[tuple[nn.Module, Tensor]] = []
        self.hooks: list[tuple[str, Any]] = []
        biases: dict[int, Tensor] = {}
        hook_dict = hook_points(model)
        wrapped_by_path = {path: c.original_component for path, c in components(model).items()}
        for module in {**module_names(model), **dict.fromkeys(wrapped_by_path.values())}:
            bias = bias_of(module)
            if bias is not None:
                biases[id(bias)] = bias
                self.modules.append((module, bias))
        for path, wrapped in wrapped_by_path.items():
            bias, name = bias_of(wrapped), f"{path}.hook_out"
            if bias is not None and name in hook_dict and model.compatibility_mode:
                read = self._reader(bias, self.at_component)
                self.hooks.append((public_name(hook_dict, name), lambda x, hook, r=read: r(x)))  # noqa: ARG005
        for name, parameter in model.original_model.named_parameters():
            if name.rpartition(".")[2].endswith("bias"):
                biases[id(parameter)] = parameter
        self.parameters = list(biases.values())

    def _reader(self, bias: Tensor, totals: dict[int, float]) -> Callable[[Any], Tensor | None]:
        """Return a function that reads the bias's relevance at an output and adds it to totals."""

        def sink(x: Tensor, g: Tensor) -> None:
            split_by_head = x.shape[-1] != bias.numel()
            pattern = "batch pos ... -> (...)" if split_by_head else "... feature -> feature"
            g_bias = reduce(precise(plain(g)), pattern, "sum")
            relevance = float((g_bias * precise(bias.detach())).sum())
            totals[id(bias)] = totals.get(id(bias), 0.0) + relevance

        def read(output: Any) -> Tensor | None:
            usable = isinstance(output, Tensor) and output.requires_grad and output.ndim > 1
            return tap(output, sink) if usable else None

        return read

    @contextmanager
    def read_at_outputs(self, model: Any) -> Iterator[None]:
        """Read relevance at the outputs of modules and components. Enter this after the rules."""

        def hook_for(bias: Tensor) -> Any:
            read = self._reader(bias, self.at_module)
            return lambda module, args, output: read(output)  # noqa: ARG005

        with own_hooks(model, self.hooks), ExitStack() as stack:
            for module, bias in self.modules:
                stack.callback(module.register_forward_hook(mine(hook_for(bias))).remove)
            yield

    @contextmanager
    def differentiable(self) -> Iterator[None]:
        """Let the biases require gradients, inside ``frozen_parameters``."""
        try:
            for bias in self.parameters:
                bias.requires_grad_(True)
            yield
        finally:
            for bias in self.parameters:
                bias.requires_grad_(False)

    def total(self, grads: tuple[Tensor | None, ...]) -> float:
        """Return the relevance of all biases.

        Args:
            grads: The gradients of ``parameters``, None where a bias has none.
        """
        total = 0.0
        for bias, g in zip(self.parameters, grads, strict=True):
            if g is not None:
                total += float(_product(bias, g).sum())
            else:
                at_component = self.at_component.get(id(bias), 0.0)
                total += self.at_module.get(id(bias), at_component)
        return total


@contextmanager
def _other_embeddings(model: Any) -> Iterator[list[Tensor]]:
    """Make a leaf of every embedding lookup: tokens, positions, token types and the like.

    Lookups that ``embedding_leaves`` replaces later have no gradient.
    """
    lookups: list[Tensor] = []

    def make_leaf(module: nn.Module, args: Any, output: Tensor) -> Tensor:  # noqa: ARG001
        lookups.append(output.detach().requires_grad_(True))
        return lookups[-1]

    with ExitStack() as stack:
        for module in module_names(model):
            if isinstance(module, nn.Embedding):
                stack.callback(module.register_forward_hook(mine(make_leaf)).remove)
        yield lookups


_SUMS = {f"{op}{end}" for op in ("add", "sub", "subtract") for end in ("", "_")} | {
    f"__{side}{op}__" for side in ("", "r", "i") for op in ("add", "sub")
}


class _Constants(TorchFunctionMode):
    """Adds up the relevance of numbers and tensors that are added to a computed value."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") not in _SUMS or len(args) < 2:
            return func(*args, **kwargs)
        computed = [isinstance(x, Tensor) and x.requires_grad for x in args[:2]]
        shapes = [tuple(x.shape) if isinstance(x, Tensor) else () for x in args[:2]]
        out = func(*args, **kwargs)
        if sum(computed) != 1 or not out.requires_grad:
            return out
        which = computed.index(True)
        constant = args[1 - which]

        def hook(g: Tensor) -> None:
            g = precise(plain(g))
            zeros = g.new_zeros(shapes[which])
            exact = precise(constant.detach()) if isinstance(constant, Tensor) else constant
            added = func(*((zeros, exact) if which == 0 else (exact, zeros)), **kwargs)
            self.total += float((added * g).masked_fill(g == 0, 0.0).sum())

        out.register_hook(hook)
        return out
