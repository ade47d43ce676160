"""Where all of Δℓ went under CP-LRP, taken from autograd alone.

Every rule of CP-LRP conserves. Each operation that relevance passes is then linear in what is
computed, so Δℓ is the sum of (value × gradient) over everything that enters the computation: the
tokens' embeddings, positions, biases, and constants added anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...engine.reading import tap
from ...hooks.context import plan
from ...hooks.hook_rules import rules_in_hooks
from ...hooks.placement import attached, own_hooks
from ...inputs.bridge import LEAVES, bias_of, components, hook_points, module_names, public_name
from ...inputs.devices import precise
from ...rules.precision import first_gradient, plain
from ...rules.rule_sets import get_rule_set
from ...rules.threads import frozen_parameters, mine


@dataclass(frozen=True)
class Account:
    """What took Δℓ, in logits.

    Attributes:
        delta: Δℓ.
        tokens: Relevance of the prompt's tokens.
        positions: Of position, type and other embeddings.
        biases: Of every bias parameter.
        constants: Of every other constant that is added to something computed.
        flow: Σ |relevance| over the tokens: how much there is to lose.
    """

    delta: float
    tokens: float
    positions: float
    biases: float
    constants: float
    flow: float

    @property
    def missing(self) -> float:
        """|Δℓ − what was accounted for|, over the larger of |Δℓ| and ``flow``."""
        took = self.tokens + self.positions + self.biases + self.constants
        return abs(self.delta - took) / max(abs(self.delta), self.flow, 1e-30)

    def __str__(self) -> str:
        parts = [f"{self.tokens:+.4f} (tokens)"]
        for name in ("positions", "biases", "constants"):
            value = getattr(self, name)
            if value != 0.0:
                parts.append(f"{value:+.4f} ({name})")
        return f"Δℓ {self.delta:+.4f} = {' '.join(parts)}"


def leaf_hooks(
    model: Any, found: dict[str, Tensor], change: Callable[[Tensor], Tensor] | None = None
) -> list[tuple[str, Any]]:
    """Hooks that make leaves of the embeddings [batch, pos, d_model], kept in ``found`` by name."""
    hook_dict = hook_points(model)

    def at(name: str) -> tuple[str, Any]:
        def leaf(tensor: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
            value = tensor.detach()
            found[name] = (value if change is None else change(value)).requires_grad_(True)
            return found[name]

        return public_name(hook_dict, name), leaf

    return [at(name) for name in LEAVES if name in hook_dict]


def account_for(model: Any, tokens: Tensor, objective: Callable[[Tensor], Tensor]) -> Account:
    """Run once under "cplrp" and add up what everything that enters took."""
    attachments, _ = plan(model, "cplrp")
    inputs: dict[str, Tensor] = {}
    biases, constants = _Biases(model), _Constants()
    with frozen_parameters(model), ExitStack() as stack:
        stack.enter_context(biases.differentiable())
        lookups = stack.enter_context(_other_embeddings(model))
        stack.enter_context(rules_in_hooks(model, get_rule_set("cplrp")))
        stack.enter_context(own_hooks(model, leaf_hooks(model, inputs)))
        stack.enter_context(constants)
        with attached(model, attachments), biases.tapped(model):
            value = objective(model(tokens))
        ends = [*inputs.values(), *lookups, *biases.own]
        grads = torch.autograd.grad(value, ends, first_gradient(model, value), allow_unused=True)
    took = [_product(x, g) for x, g in zip(ends, grads, strict=True)]
    embedded = took[: len(inputs)]
    of_tokens = [r for name, r in zip(inputs, embedded, strict=True) if name == LEAVES[0]]
    others = [r for name, r in zip(inputs, embedded, strict=True) if name != LEAVES[0]]
    others += took[len(inputs) : len(inputs) + len(lookups)]
    return Account(
        delta=float(value.detach()),
        tokens=float(sum(r.sum() for r in of_tokens)),
        positions=float(sum(r.sum() for r in others)),
        biases=biases.total(grads[len(inputs) + len(lookups) :]),
        constants=constants.total,
        flow=float(sum(r.sum(-1).abs().sum() for r in of_tokens)),
    )


def _product(x: Tensor, g: Tensor | None) -> Tensor:
    return torch.zeros(1) if g is None else precise(x.detach()) * precise(plain(g))


class _Biases:
    """All biases of a model: their gradients, or what is read at the output where there is none.

    The rule of a norm module replaces the module's own graph, its bias included, and in
    compatibility mode TransformerLens computes with copies; what a bias takes is then bias ×
    gradient at the module's output, or at the component's.
    """

    def __init__(self, model: Any) -> None:
        self.at_module: dict[int, float] = {}
        self.at_component: dict[int, float] = {}
        self.modules: list[tuple[nn.Module, Tensor]] = []
        self.hooks: list[tuple[str, Any]] = []
        found: dict[int, Tensor] = {}
        hook_dict = hook_points(model)
        by_path = {path: c.original_component for path, c in components(model).items()}
        for module in {**module_names(model), **dict.fromkeys(by_path.values())}:
            bias = bias_of(module)
            if bias is not None:
                found[id(bias)] = bias
                self.modules.append((module, bias))
        for path, wrapped in by_path.items():
            bias, name = bias_of(wrapped), f"{path}.hook_out"
            if bias is not None and name in hook_dict and model.compatibility_mode:
                read = self._reader(bias, self.at_component)
                self.hooks.append((public_name(hook_dict, name), lambda x, hook, r=read: r(x)))  # noqa: ARG005
        for name, parameter in model.original_model.named_parameters():
            if name.rpartition(".")[2].endswith("bias"):
                found[id(parameter)] = parameter
        self.own = list(found.values())

    def _reader(self, bias: Tensor, into: dict[int, float]) -> Callable[[Any], Tensor | None]:
        def sink(x: Tensor, g: Tensor) -> None:
            g = precise(plain(g))
            last = g.flatten(0, -2) if x.shape[-1] == bias.numel() else g.flatten(0, 1).flatten(1)
            took = float((last.sum(0) * precise(bias.detach())).sum())
            into[id(bias)] = into.get(id(bias), 0.0) + took

        def read(output: Any) -> Tensor | None:
            usable = isinstance(output, Tensor) and output.requires_grad and output.ndim > 1
            return tap(output, sink) if usable else None

        return read

    @contextmanager
    def tapped(self, model: Any) -> Iterator[None]:
        """Reads at the outputs; to be entered after the rules."""

        def at(bias: Tensor) -> Any:
            read = self._reader(bias, self.at_module)
            return lambda module, args, output: read(output)  # noqa: ARG005

        with own_hooks(model, self.hooks), ExitStack() as stack:
            for module, bias in self.modules:
                stack.callback(module.register_forward_hook(mine(at(bias))).remove)
            yield

    @contextmanager
    def differentiable(self) -> Iterator[None]:
        """Gradients for the biases, inside ``frozen_parameters``."""
        try:
            for bias in self.own:
                bias.requires_grad_(True)
            yield
        finally:
            for bias in self.own:
                bias.requires_grad_(False)

    def total(self, grads: tuple[Tensor | None, ...]) -> float:
        """What all of them took."""
        took = 0.0
        for bias, g in zip(self.own, grads, strict=True):
            if g is not None:
                took += float(_product(bias, g).sum())
            else:
                elsewhere = self.at_component.get(id(bias), 0.0)
                took += self.at_module.get(id(bias), elsewhere)
        return took


@contextmanager
def _other_embeddings(model: Any) -> Iterator[list[Tensor]]:
    """Lookups of positions, types and the like, each a leaf; those cut off later stay unused."""
    found: list[Tensor] = []

    def note(module: nn.Module, args: Any, output: Tensor) -> Tensor:  # noqa: ARG001
        found.append(output.detach().requires_grad_(True))
        return found[-1]

    with ExitStack() as stack:
        for module in module_names(model):
            if isinstance(module, nn.Embedding):
                stack.callback(module.register_forward_hook(mine(note)).remove)
        yield found


_SUMS = {f"{op}{end}" for op in ("add", "sub", "subtract") for end in ("", "_")} | {
    f"__{side}{op}__" for side in ("", "r", "i") for op in ("add", "sub")
}


class _Constants(TorchFunctionMode):
    """Adds up what numbers and tables take that are added to something computed."""

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
        other = args[1 - which]

        def hook(g: Tensor) -> None:
            g = precise(plain(g))
            zeros = g.new_zeros(shapes[which])
            constant = precise(other.detach()) if isinstance(other, Tensor) else other
            added = func(*((zeros, constant) if which == 0 else (constant, zeros)), **kwargs)
            self.total += float((added * g).masked_fill(g == 0, 0.0).sum())

        out.register_hook(hook)
        return out
