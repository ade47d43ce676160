"""The columns of ``side_by_side.py``: what each measures, in a process that answers questions.

A column is a call with token ids [1, pos] that computes the gradient, or relevance, of the logit of
token 5 minus that of token 7 at the last position. Columns of one kind share a process and a model;
lxt has its own, since it patches the classes of transformers, and so does TransformerLens, which
replaces modules. No column computes gradients of weights, and none keeps a key-value cache.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _measure import Meter
from torch import Tensor

COLUMNS = {
    "hf": ("HF sdpa", "HF eager"),
    "bridge": (
        "TransformerLens", "attribute attnlrp", "attribute gim", "graph attnlrp", "graph gim",
    ),
    "lxt": ("lxt",),
}  # fmt: skip
MASS = 0.85
TARGET, CONTRAST = 5, 7
_SAFE = 0.9  # share of the free memory that a column may need


@dataclass
class Answer:
    """What a call says besides how long it took: relevance of the tokens, and how it ran."""

    relevance: Tensor | None = None
    ran: str = ""


Call = Callable[[Tensor], Answer]


# ---- the columns of each process


def gradient_times_input(model: Any, ids: Tensor) -> Answer:
    """Of a Hugging Face model, summed over the embedding's dimensions: [pos]."""
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    logits = model(inputs_embeds=embedded, use_cache=False).logits[0, -1]
    (gradient,) = torch.autograd.grad(logits[TARGET] - logits[CONTRAST], embedded)
    return Answer((gradient * embedded).float().sum(-1)[0].detach())


def load(folder: str, device: str, dtype: torch.dtype) -> Any:
    """A Hugging Face model with its default attention, whose weights need no gradients."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    return model.requires_grad_(False)


def hf(folder: str, device: str, dtype: torch.dtype) -> tuple[Any, dict[str, Call]]:
    """Hugging Face's own forward and backward, with fused and with eager attention."""
    model = load(folder, device, dtype)

    def column(attention: str) -> Call:
        def call(ids: Tensor) -> Answer:
            model.set_attn_implementation(attention)
            return gradient_times_input(model, ids)

        return call

    return model, {f"HF {kind}": column(kind) for kind in ("sdpa", "eager")}


def lxt(folder: str, device: str, dtype: torch.dtype, checkout: str) -> tuple[Any, dict[str, Call]]:
    """AttnLRP by lxt, imported from a checkout of it, as its examples say.

    Its patch is asked for by the model's own module in transformers; what it fails to patch is an
    error here, where lxt warns. Without its optional gradient checkpointing, which takes longer.
    """
    sys.path.insert(0, str(Path(checkout).resolve()))
    from lxt import efficient

    where = Path(efficient.__file__).resolve()
    if not where.is_relative_to(Path(checkout).resolve()):
        raise ImportError(f"lxt was imported from {where}, not from {checkout}")
    model = load(folder, device, dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Failed to patch|.*already patched")
        efficient.monkey_patch(sys.modules[type(model).__module__])
    return model, {"lxt": lambda ids: gradient_times_input(model, ids)}


def bridge(
    folder: str, device: str, dtype: torch.dtype, attention: str
) -> tuple[Any, dict[str, Call]]:
    """TransformerLens' own forward and backward, and this package."""
    from transformer_lens.model_bridge import TransformerBridge

    import tl_contrastive_lrp as clrp

    model = TransformerBridge.boot_transformers(folder, device=device, dtype=dtype).eval()
    model.original_model.requires_grad_(False)
    objective = clrp.logit_diff(model, TARGET, CONTRAST)

    def transformer_lens(ids: Tensor) -> Answer:
        leaf: dict[str, Tensor] = {}

        def start(tensor, hook):
            leaf["x"] = tensor.detach().requires_grad_(True)
            return leaf["x"]

        with model.hooks(fwd_hooks=[("embed.hook_out", start)]):
            (gradient,) = torch.autograd.grad(objective(model(ids)), leaf["x"])
        return Answer((gradient * leaf["x"]).float().sum(-1)[0].detach())

    def of(function: Any) -> dict[str, Any]:
        takes_it = "attention" in inspect.signature(function).parameters
        return {"attention": attention, "progress": False} if takes_it else {"progress": False}

    def attribute(rules: str) -> Call:
        def call(ids: Tensor) -> Answer:
            result = clrp.attribute(model, ids, objective, rules=rules, **of(clrp.attribute))
            return Answer(result.tokens, f"{result.memory}, {result.attention}")

        return call

    def graph(rules: str) -> Call:
        def call(ids: Tensor) -> Answer:
            found = clrp.attribution_graph(
                model, ids, objective, rules=rules, mass=MASS, **of(clrp.attribution_graph)
            )
            ran = [found.memory, getattr(found, "attention", "")]
            ran.append(f"{len(found.weight):,} edges kept")
            return Answer(found.relevance[0], ", ".join(filter(None, ran)))

        return call

    calls: dict[str, Call] = {"TransformerLens": transformer_lens}
    for rules in ("attnlrp", "gim"):
        calls |= {f"attribute {rules}": attribute(rules), f"graph {rules}": graph(rules)}
    return model, calls


# ---- will it fit?

# Float32 tensors of [head, pos, pos] that eager attention keeps for the backward, by block, and
# those that its peak adds; of [pos, d_model] and [pos, d_mlp] by block; of [pos, d_vocab] in all.
# SmolLM2-135M took 1,383 MiB at 768 tokens under HF sdpa, 2,272 under HF eager and 1,544 under
# TransformerLens; this says 1,444, 2,295 and 2,133.
_SQUARES = {"HF eager": (1.2, 6.0), "TransformerLens": (1.0, 4.0)}
_WIDTHS, _NEURONS, _LOGITS = 12, 3, 3


def needed_bytes(config: Any, column: str, length: int) -> int:
    """About how many bytes a column that knows no tiles needs besides the model; 0 for ours."""
    if column.startswith(("attribute", "graph")):
        return 0
    kept, peak = _SQUARES.get(column, (0.0, 0.0))
    layers = config.num_hidden_layers
    square = config.num_attention_heads * length * length
    by_position = _WIDTHS * config.hidden_size + _NEURONS * config.intermediate_size
    numbers = (layers * kept + peak) * square + layers * length * by_position
    return int(4 * (numbers + _LOGITS * length * config.vocab_size))


# ---- answering


class Columns:
    """The columns of one process, by name."""

    def __init__(self, kind: str, options: dict[str, Any]) -> None:
        device, dtype = options["device"], getattr(torch, options["dtype"])
        torch.set_num_threads(options["threads"])
        self.meter = Meter(device)
        more = {
            "hf": {},
            "bridge": {"attention": options["attention"]},
            "lxt": {"checkout": options["lxt"]},
        }[kind]
        make = {"hf": hf, "bridge": bridge, "lxt": lxt}[kind]
        model, self.calls = make(options["folder"], device, dtype, **more)
        self.config = getattr(model, "original_model", model).config
        self.device = device
        for call in self.calls.values():  # what is done once: audits, imports, threads
            call(self.ids(16))

    def ids(self, length: int) -> Tensor:
        """The prompt of this length, the same in every process."""
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(8, self.config.vocab_size, (1, length), generator=generator)
        return ids.to(self.device)

    def answer(self, question: str, column: str, length: int) -> dict[str, Any]:
        """Peak memory with what the call said, or seconds; or why there is neither."""
        need, free = needed_bytes(self.config, column, length), self.meter.free()
        if question == "peak" and need > _SAFE * free:
            return {"skipped": f"needs about {need / 1e9:.0f} GB, {free / 1e9:.0f} are free"}
        ids = self.ids(length)
        try:
            if question == "seconds":
                return {"seconds": self.meter.seconds(lambda: self.calls[column](ids))[0]}
            peak, said = self.meter.peak(lambda: self.calls[column](ids))
        except (RuntimeError, ValueError, MemoryError) as error:  # no memory, or refused
            return {"skipped": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
        relevance = None if said.relevance is None else said.relevance.double().tolist()
        return {"peak": peak, "ran": said.ran, "relevance": relevance}


def serve() -> None:
    """Answers each line of standard input, a question in JSON, with a line of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    kind, options = json.loads(sys.argv[1])
    try:
        columns = Columns(kind, options)
        started: dict[str, Any] = {"clock": columns.meter.clock}
    except Exception as error:  # lxt's, say, of a release that does not know this transformers
        if kind != "lxt":
            raise
        started = {"skipped": f"{type(error).__name__}: {error}"}
    print(json.dumps(started), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(columns.answer(*json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    serve()
