"""A model from its configuration alone: random weights, no tokenizer, no large download.

Which operations a model computes does not depend on its weights, and hardly on its size. A model
that is too big for this machine gets fewer layers (enough for one of each kind), a small
vocabulary, narrow MLPs and few experts; its notes say so.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from ..errors import OutOfMemoryError
from .errors import CliError, Code
from .model import Loaded, checked_name, is_local, quiet_libraries, why_not_loaded

_SMALL = 200_000_000  # up to this many parameters, a model is not reduced
_MOST_LAYERS = 12
_VOCABULARY = 512
_WIDTH = 256
# Words in the names of settings that say at which layer something changes.
_LAYER_WORDS = ("pattern", "interval", "period", "replace", "offset", "step", "every", "dense")
_MLP_WIDTHS = (
    "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_dim",
    "n_inner", "ffn_hidden_size", "shared_intermediate_size",
)  # fmt: skip
_EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")


def has_weights(name: str) -> bool:
    """Whether a folder holds weights; a name on the hub is assumed to have them."""
    folder = Path(name).expanduser()
    patterns = ("*.safetensors", "*.bin", "*.pt", "*.pth")
    return not folder.is_dir() or any(any(folder.glob(p)) for p in patterns)


def random_model(name: str, device: str, dtype: str) -> Loaded:
    """Make the model that a config.json describes, with random weights.

    Args:
        name: Folder that holds config.json, or a name on the hub, from which only that is read.
        device: "cpu", "cuda" or "mps".
        dtype: Floating-point type of the weights.

    Returns:
        The model, with notes on how it differs from the real one.

    Raises:
        CliError: There is no such configuration, TransformerLens does not know its kind, or even
            the reduced model cannot be made.
    """
    path = checked_name(name)
    try:
        with quiet_libraries():
            from transformers import AutoConfig

            config = AutoConfig.from_pretrained(path)
    except Exception as error:
        raise CliError(Code.MODEL, why_not_loaded(name, error)) from error
    notes = ["Random weights: this says what is covered, nothing about the trained model."]
    if getattr(config, "quantization_config", None) is not None:
        notes.append(
            "The checkpoint is quantised, and relevance needs weights that can be read as numbers: "
            "load it unquantised."
        )
    attempts: list[tuple[dict[str, Any], tuple[str, ...]]] = [({}, ())]
    last: Exception | None = None
    with quiet_libraries():
        if _size(config) > _SMALL:
            attempts = [_reduced(config, narrow=True), _reduced(config, narrow=False)]
        for changes, reductions in attempts:
            try:
                bridge = _boot(config, changes, device, dtype)
                bridge.cfg.model_name = Path(path).name if is_local(path) else path
                return Loaded(bridge, name, (*notes, *reductions))
            except Exception as error:
                last = error
    assert last is not None
    raise CliError(Code.MODEL, _why_not_made(name, last)) from last


def _why_not_made(name: str, error: Exception) -> str:
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return (
        f"No model can be made from the config of {name}: {first.strip()} "
        f"({type(error).__name__}). Does TransformerLens know this architecture? "
        "TransformerBridge.list_supported_models() lists all it knows."
    )


def _boot(config: Any, changes: dict[str, Any], device: str, dtype: str) -> Any:
    """The bridge of a configuration with these settings changed."""
    import torch
    import transformers
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    settings = copy.deepcopy(config)
    text = _text(settings)
    for key, value in changes.items():
        setattr(text, key, value)
    if not hasattr(settings, "pad_token_id"):
        settings.pad_token_id = None
    settings._attn_implementation = "eager"
    if not settings.architectures:
        raise ValueError("it names no model class under architectures")
    architecture = settings.architectures[0]
    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        raise ValueError(f"transformers has no model class {architecture!r}")
    with torch.device("meta"):
        n_parameters = sum(p.numel() for p in model_class(settings).parameters())
    _require_memory(n_parameters * getattr(torch, dtype).itemsize, device)
    default_dtype = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.set_default_dtype(getattr(torch, dtype))
        try:
            model = model_class(settings)
        finally:
            torch.set_default_dtype(default_dtype)
    model = model.to(device=device, dtype=getattr(torch, dtype)).eval()
    bridge: Any = build_bridge_from_module(model, architecture, hf_config=settings)
    return bridge.eval()


def _require_memory(size: int, device: str) -> None:
    """Refuse a model that does not fit.

    Raises:
        OutOfMemoryError: ``size`` bytes are too many for the device.
    """
    import torch

    from ..engine.memory import free_bytes, gib

    free = free_bytes(torch.device(device))
    if size > 0.7 * free:
        raise OutOfMemoryError(
            f"even reduced it takes {gib(size)}, and {gib(free)} are free. Try --dtype bfloat16"
        )


# ---------------------------------------------------------------- smaller, of the same kind


def _text(config: Any) -> Any:
    """The part of a configuration that is about the language model."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _size(config: Any) -> float:
    """Number of parameters, counted without allocating them; infinite if that fails."""
    try:
        import torch
        from transformers import AutoModel

        with torch.device("meta"):
            model = AutoModel.from_config(config)
    except Exception:
        return float("inf")
    return float(sum(p.numel() for p in model.parameters()))


def layers_needed(settings: dict[str, Any], total: int) -> int:
    """How many layers from the first are needed for one of each kind.

    Args:
        settings: The configuration's settings by name.
        total: Number of layers of the whole model.
    """
    needed = 2
    for key, value in settings.items():
        if isinstance(value, list | tuple) and len(value) == total:
            first_layers = {repr(v): i for i, v in reversed(list(enumerate(value)))}
            needed = max(needed, *(i + 1 for i in first_layers.values()))
        elif isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
            needed = max(needed, len(value)) if "block" in key or "layer" in key else needed
        elif isinstance(value, int) and not isinstance(value, bool) and 0 < value < total:
            names_layer = any(word in key for word in _LAYER_WORDS) or key == "max_window_layers"
            needed = max(needed, value + 1) if names_layer else needed
    return min(total, needed)


def _reduced(config: Any, *, narrow: bool) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Settings to change for fewer and, if ``narrow``, narrower layers; and notes on them."""
    text = _text(config)
    settings = {key: value for key, value in vars(text).items() if not key.startswith("_")}
    changes: dict[str, Any] = {}
    notes: list[str] = []
    total = int(text.num_hidden_layers)
    n = min(layers_needed(settings, total), _MOST_LAYERS)
    if n < total:
        changes["num_hidden_layers"] = n
        for key, value in settings.items():
            if isinstance(value, list | tuple) and len(value) == total:
                changes[key] = type(value)(value[:n])
        notes.append(f"The first {n} of {total} layers stand for all.")
    if narrow:
        changes |= _narrowed(settings)
        notes.append("Vocabulary, MLP width and number of experts are reduced.")
    return changes, tuple(notes)


def _narrowed(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings to change for a small vocabulary, narrow MLPs and few experts."""
    changes: dict[str, Any] = {}
    vocabulary = min(int(settings["vocab_size"]), _VOCABULARY)
    for key, value in settings.items():
        is_number = isinstance(value, int) and not isinstance(value, bool)
        if key == "vocab_size":
            changes[key] = vocabulary
        elif key.endswith("_token_id"):
            changes[key] = _within(value, vocabulary)
        elif key in _MLP_WIDTHS and is_number:
            changes[key] = min(value, _WIDTH)
        elif key in _EXPERTS and is_number:
            groups, active = settings.get("n_group") or 1, settings.get("num_experts_per_tok") or 1
            few = max(16, 2 * groups, 2 * active)
            changes[key] = min(value, -(-few // groups) * groups)  # a multiple of the groups
    return changes


def _within(ids: Any, vocabulary: int) -> Any:
    """Token ids, or one of them, moved into the vocabulary."""
    if isinstance(ids, list):
        return [_within(i, vocabulary) for i in ids]
    return min(ids, vocabulary - 1) if isinstance(ids, int) else ids
