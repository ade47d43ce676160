"""The models of a study: how they are named, opened, told apart and compared.

A model is named by a ``ModelSpec``: a name on the hub, a local folder, or one of the demo family.
"demo" is the model of the package; "demo/small", "demo/large" and the checkpoints "demo/small@1000"
lie in the folder ``demo_family`` of a checkout, beside the package or above the current folder, and
share its tokenizer.

``fingerprint`` is what a store keys results by: two models with equal fingerprints have the same
configuration, the same numbers in the same parameters, and the same tokenizer and chat template.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..demo.model import _quiet_and_offline, demo_dir, load_demo_model
from ..errors import TokenizerMismatchError
from ..inputs.bridge import require_bridge
from ..inputs.devices import loaded
from ..inputs.tokens import special_ids
from ..rules.threads import paths_under

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_DEMO = re.compile(r"demo(?:/(?P<size>[a-z]+)(?:@(?P<step>\d+))?)?")
# Keys of a configuration that say where it was read from, not what the model computes.
_NOT_WEIGHTS = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")


@dataclass(frozen=True)
class ModelSpec:
    """A model by name, and how to load it.

    Attributes:
        name: What the study calls it.
        model: A name on the hub, a local folder, or "demo", "demo/small", "demo/large", or a
            checkpoint such as "demo/small@1000", at training step 1000.
        revision: Branch, tag or commit on the hub; None for the default.
        dtype: Floating-point type of the weights: "float32", "bfloat16", "float16" or "float64".
        device_map: How accelerate spreads the model over devices ("auto"); None for one device.

    Raises:
        ValueError: A field is empty or unknown, or does not go with the others.

    Example:
        >>> clrp.study.ModelSpec("step 1000", "demo/small@1000").dtype
        'float32'
    """

    name: str
    model: str
    revision: str | None = None
    dtype: str = "float32"
    device_map: str | None = None

    def __post_init__(self) -> None:
        if not self.name or not self.model:
            raise ValueError(f"A model needs a name and what to load: {self!r}.")
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; use one of {', '.join(_DTYPES)}.")
        if _DEMO.fullmatch(self.model) and (self.revision or self.device_map):
            raise ValueError(
                f"{self.model} is a model of the demo family, which has neither revision nor "
                "device_map. A checkpoint is written demo/small@1000."
            )


def open_model(spec: ModelSpec, device: str | torch.device | None = None) -> TransformerBridge:
    """Load a model of a study as a TransformerLens bridge in evaluation mode.

    Args:
        spec: Which one, and how.
        device: As in ``boot_transformers``; None lets TransformerLens choose.

    Returns:
        A ``TransformerBridge``.

    Raises:
        FileNotFoundError: It is of the demo family, and that model is not there.
        ValueError: A device is given besides a ``device_map``.
        OSError: The hub or the folder does not have it, as transformers raises it.

    Example:
        >>> opened = clrp.study.open_model(clrp.study.ModelSpec("mine", "demo"), device="cpu")
        >>> opened.cfg.model_name
        'demo model'
    """
    dtype: torch.dtype = getattr(torch, spec.dtype)
    demo = _DEMO.fullmatch(spec.model)
    if demo and demo["size"] is None:
        return load_demo_model(device=device, dtype=dtype)
    from transformer_lens.model_bridge import TransformerBridge

    if demo:
        from transformers import AutoTokenizer

        folder = _family_dir(demo["size"], demo["step"])
        with _quiet_and_offline():
            model = TransformerBridge.boot_transformers(
                str(folder),
                device=device,
                dtype=dtype,
                tokenizer=AutoTokenizer.from_pretrained(demo_dir()),
            )
        model.cfg.model_name = spec.model
        model.eval()
        return model
    if spec.device_map is not None and device is not None:
        raise ValueError(
            f"device_map={spec.device_map!r} chooses the devices of {spec.model}; leave the device "
            "out."
        )
    options: dict[str, Any] = {"revision": spec.revision} if spec.revision else {}
    if spec.device_map is not None:
        options["device_map"] = spec.device_map
    elif device is not None:
        options["device"] = device
    model = TransformerBridge.boot_transformers(spec.model, dtype=dtype, **options)
    model.eval()
    return model


def _family() -> Path:
    """The demo family's folder: beside the package, else in the current folder or one above it."""
    beside, here = Path(__file__).resolve().parents[2], Path.cwd()
    for root in (beside, here, *here.parents):
        if (root / "demo_family" / "small" / "config.json").is_file():
            return root / "demo_family"
    return beside / "demo_family"


def family_steps() -> tuple[int, ...] | None:
    """Steps of the small demo model's checkpoints, the model itself last.

    Returns:
        The steps, rising; None where the demo family is not at hand.
    """
    root = _family()
    last = _last_step(root / "small")
    if last is None:
        return None
    found = (path.parent.name.removeprefix("small-") for path in root.glob("small-*/config.json"))
    return tuple(sorted({int(step) for step in found if step.isdigit()} | {last}))


def _family_dir(size: str, step: str | None) -> Path:
    """The folder of a model of the demo family.

    Raises:
        FileNotFoundError: The family is not installed, or has no such model.
    """
    root = _family()
    if not root.is_dir():
        raise FileNotFoundError(
            f"The demo family is not in {root}. Only the model 'demo' is part of the installed "
            "package; the others come with a checkout of its repository: run this in a folder "
            "of the checkout, or use 'demo'."
        )
    folder = root / (size if step is None else f"{size}-{int(step):04d}")
    if step is not None and not folder.is_dir() and _last_step(root / size) == int(step):
        folder = root / size  # the last checkpoint is the model itself
    if not (folder / "config.json").is_file():
        there = sorted(path.parent.name for path in root.glob("*/config.json"))
        names = [
            f"demo/{n}" if "-" not in n else f"demo/{n.split('-')[0]}@{int(n.split('-')[1])}"
            for n in there
        ]
        raise FileNotFoundError(
            f"The demo family has no demo/{size}{'' if step is None else '@' + step}. It has demo, "
            f"{', '.join(names) or 'nothing else'}."
        )
    return folder


def _last_step(folder: Path) -> int | None:
    file = folder / "config.json"
    if not file.is_file():
        return None
    steps = json.loads(file.read_text("utf-8")).get("trained_steps")
    return None if steps is None else int(steps)


@torch.no_grad()
def fingerprint(model: Any) -> str:
    """A hash of a model's configuration, of every parameter, and of what makes texts of its ids.

    It covers the name, type, shape and bytes of each parameter and of each buffer that is saved
    with them, wherever it is (also weights that accelerate keeps on disk); the tokenizer with its
    special tokens and chat template; and the tokens that end a completion. It is the same for the
    same model on any device.

    Args:
        model: A ``TransformerBridge``.

    Returns:
        64 hexadecimal digits.

    Raises:
        TypeError: It is no bridge.

    Example:
        >>> len(clrp.study.fingerprint(model))
        64
    """
    require_bridge(model)
    sha = hashlib.sha256()
    config = model.original_model.config.to_dict()
    kept = {k: v for k, v in config.items() if k not in _NOT_WEIGHTS}
    sha.update(json.dumps(kept, sort_keys=True, default=str).encode())
    sha.update(json.dumps(_reading_and_writing(model), sort_keys=True, default=str).encode())
    seen: set[int] = set()
    for module, path in paths_under(model.original_model).items():
        with loaded(module):
            loaded_with_it = {
                name: buffer
                for name, buffer in module._buffers.items()
                if name not in module._non_persistent_buffers_set
            }
            for name, parameter in {**module._parameters, **loaded_with_it}.items():
                if parameter is None or id(parameter) in seen:
                    continue
                if not parameter.is_meta:
                    seen.add(id(parameter))
                full = f"{path}.{name}".replace("_original_component.", "")
                sha.update(f"\n{full} {parameter.dtype} {list(parameter.shape)}\n".encode())
                sha.update(_bytes(parameter))
    return sha.hexdigest()


def _reading_and_writing(model: Any) -> dict[str, Any]:
    """What decides the ids of a prompt, which of them are special, and where a completion ends."""
    tokenizer = model.tokenizer
    ends = getattr(getattr(model.original_model, "generation_config", None), "eos_token_id", None)
    if tokenizer is None:
        return {"ends": ends}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: dict[str, Any] = tokenizer.get_vocab() if backend is None else {}
    if backend is not None:
        content = json.loads(backend.to_str())
        for left_by_calls in ("padding", "truncation"):
            content.pop(left_by_calls, None)
    return {
        "ends": ends,
        "content": content,
        "special": special_ids(model),
        "roles": [tokenizer.bos_token_id, tokenizer.eos_token_id],
        "template": getattr(tokenizer, "chat_template", None),
    }


def _bytes(x: Tensor) -> bytes:
    flat = x.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def check_same_tokens(base: Any, other: Any) -> None:
    """Refuse two models whose tokenizers differ: ids of the one would mean other texts.

    Args:
        base: A ``TransformerBridge``.
        other: The model that is to be given ``base``'s ids.

    Raises:
        TokenizerMismatchError: A token differs, or which are special; the message shows it.

    Example:
        >>> same = clrp.load_demo_model(device="cpu")
        >>> clrp.study.check_same_tokens(model, same) is None
        True
    """
    one, two = (_vocabulary(m) for m in (base, other))
    for i in sorted(one.keys() | two.keys()):
        if one.get(i) != two.get(i):
            raise TokenizerMismatchError(
                f"The tokenizers of {base.cfg.model_name} and {other.cfg.model_name} differ: id "
                f"{i} is {_shown(one.get(i))} in the first and {_shown(two.get(i))} in the second. "
                "Compare models of one tokenizer only."
            )
    special = set(special_ids(base)) ^ set(special_ids(other))
    if special or base.tokenizer.eos_token_id != other.tokenizer.eos_token_id:
        i = min(special, default=base.tokenizer.eos_token_id)
        raise TokenizerMismatchError(
            f"The tokenizers of {base.cfg.model_name} and {other.cfg.model_name} have the same "
            f"tokens, but only one of them treats {_shown(one.get(i))} (id {i}) as special or as "
            "the end of a text."
        )
    needed = max(one)
    if other.cfg.d_vocab <= needed and base.cfg.d_vocab > other.cfg.d_vocab:
        raise TokenizerMismatchError(
            f"{other.cfg.model_name} has logits for {other.cfg.d_vocab} tokens, but its tokenizer "
            f"has ids up to {needed}."
        )


def _vocabulary(model: Any) -> dict[int, str]:
    if model.tokenizer is None:
        raise TokenizerMismatchError(
            f"{model.cfg.model_name} has no tokenizer, so its ids cannot be compared."
        )
    return {i: token for token, i in model.tokenizer.get_vocab().items()}


def _shown(token: str | None) -> str:
    return "missing" if token is None else repr(token)
