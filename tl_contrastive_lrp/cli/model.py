"""Loads the model, without the output of other libraries.

The model may be a folder, a name on the hub, or a GGUF file (its weights are dequantised), each
with or without an adapter (merged into the weights). The result is always one ordinary model, and
notes say how it was changed.
"""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import Argument, Message, is_out_of_memory
from .errors import CliError, Code


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep other libraries' bars, log lines and warnings off stdout and stderr."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with (
        warnings.catch_warnings(),
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        import logging

        from transformers.utils import logging as transformers_logging

        level = transformers_logging.get_verbosity()
        bars = transformers_logging.is_progress_bar_enabled()
        disabled = logging.root.manager.disable
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        logging.disable(logging.WARNING)  # TransformerLens logs on the root logger
        try:
            yield
        finally:
            logging.disable(disabled)
            transformers_logging.set_verbosity(level)
            if bars:
                transformers_logging.enable_progress_bar()


def is_local(name: str) -> bool:
    """Whether ``name`` is a folder or file on this machine rather than a name on the hub."""
    return Path(name).expanduser().exists()


def is_gguf(name: str) -> bool:
    """Whether ``name`` is a GGUF file on this machine."""
    path = Path(name).expanduser()
    return path.suffix.lower() == ".gguf" and path.is_file()


_ADAPTER = "adapter_config.json"


def _require_package(package: str, extra: str, what: str) -> None:
    """Refuse to continue without an optional package.

    Raises:
        CliError: The package is not installed.
    """
    if find_spec(package) is None:
        raise CliError(
            Code.MODEL,
            f'{what} needs the package {package}. Type: pip install "tl_contrastive_lrp[{extra}]"',
        )


def checked_name(name: str) -> str:
    """Check the name of a model.

    Args:
        name: Folder of a model, or its name on the hub.

    Returns:
        The folder or the name, as transformers takes it.

    Raises:
        CliError: There is no such folder, or it holds no model.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        adapter = (path / _ADAPTER).is_file()
        if adapter and not (path / "config.json").is_file():
            raise CliError(
                Code.MODEL,
                f"The folder {name} holds an adapter, not a whole model. Type --adapter {name}, "
                "and leave the model out (or give the base model).",
            )
        if adapter:  # transformers would silently leave it out
            _require_package("peft", "adapters", f"The folder {name} holds an adapter, too, which")
        if not (path / "config.json").is_file():
            raise CliError(
                Code.MODEL,
                f"The folder {name} holds no model: there is no config.json in it. Give the folder "
                "that save_pretrained wrote.",
            )
        return str(path)
    if path.is_file():
        raise CliError(
            Code.MODEL, f"{name} is a file. Give the folder that holds config.json and weights."
        )
    if path.suffix.lower() == ".gguf":
        raise CliError(Code.MODEL, f"There is no file {name}. Give the path of a GGUF file here.")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name:
        raise CliError(
            Code.MODEL,
            f"There is no folder {name}. Give the folder of a model, or a name on the Hugging Face "
            "hub such as Qwen/Qwen3-0.6B.",
        )
    return name


def checked_device(name: str | None, dtype: str) -> str:
    """Choose the device.

    Args:
        name: "cpu", "cuda" or "mps"; None for an NVIDIA GPU where there is one, else the CPU.
        dtype: Floating-point type of the weights.

    Raises:
        CliError: The device is not there, or cannot hold ``dtype``.
    """
    import torch

    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise CliError(Code.MODEL, "torch finds no CUDA device here. Use --device cpu.")
    if name == "mps":
        _check_mps(dtype)
    return name or ("cuda" if has_cuda else "cpu")


def _check_mps(dtype: str) -> None:
    """Check that there is an Apple GPU, that it computes correctly, and that it has the type.

    Raises:
        CliError: One of them fails.
    """
    import torch

    if not torch.backends.mps.is_available():
        reason = (
            "it needs a Mac with an Apple GPU, and a macOS that this torch works with"
            if torch.backends.mps.is_built()
            else "this torch is built without it"
        )
        raise CliError(
            Code.MODEL, f"torch finds no Apple GPU (MPS) here: {reason}. Use --device cpu."
        )
    if torch.__version__.startswith("2.8."):  # github.com/pytorch/pytorch/issues/161640
        raise CliError(
            Code.MODEL,
            f"torch {torch.__version__} multiplies wrongly on MPS. Use --device cpu, or type: "
            'pip install --upgrade "torch>=2.9"',
        )
    if dtype == "float64":
        raise CliError(Code.USAGE, "MPS has no float64. Use --dtype float32, or --device cpu.")


@dataclass(frozen=True)
class Loaded:
    """A loaded model.

    Attributes:
        bridge: The model as a ``TransformerBridge``.
        name: Its name in results.
        notes: Sentences on how it was changed when it was loaded.
    """

    bridge: Any
    name: str
    notes: tuple[str, ...] = ()


def load_model(
    name: str | None, device: str | None, dtype: str, adapter: str | None = None
) -> Loaded:
    """Load a model in evaluation mode.

    Args:
        name: Folder, name on the hub, or GGUF file; None only with an adapter, whose own
            configuration then names the base model.
        device: "cpu", "cuda" or "mps"; None for an NVIDIA GPU where there is one, else the CPU.
        dtype: Floating-point type of the weights.
        adapter: Folder of a PEFT adapter to merge into the weights.

    Raises:
        CliError: The model does not exist, cannot be loaded, or has no tokenizer; there is no such
            device; or a package is missing.
    """
    settings = {} if adapter is None else _adapter_settings(adapter)
    base = name or str(settings.get("base_model_name_or_path") or "")
    if not base:
        raise CliError(
            Code.MODEL,
            Message(
                f"{adapter}/{_ADAPTER} names no base model. Give it with ", Argument("model"), "."
            ),
        )
    try:
        path = str(Path(base).expanduser()) if is_gguf(base) else checked_name(base)
    except CliError as error:
        if name is not None:
            raise
        raise CliError(
            error.code,
            Message(
                f"{error} ({base} is the base model that {adapter}/{_ADAPTER} names; ",
                Argument("model"),
                " gives another.)",
            ),
        ) from error
    if is_gguf(path):
        _require_package("gguf", "gguf", "A GGUF file")
    device = checked_device(device, dtype)
    notes: list[str] = []
    try:
        with quiet_libraries():
            model, notes = _boot(path, device, dtype, adapter, settings, name is None)
    except CliError:
        raise
    except Exception as error:
        raise CliError(Code.MODEL, why_not_loaded(base, error)) from error
    if model.tokenizer is None:
        raise CliError(
            Code.MODEL,
            f"{base} has no tokenizer, so text cannot become tokens. Save one there: "
            "tokenizer.save_pretrained(folder).",
        )
    model.eval()
    full_name = base if adapter is None else f"{base} + {adapter}"
    return Loaded(model, full_name, tuple(notes))


def _boot(
    path: str,
    device: str,
    dtype: str,
    adapter: str | None,
    settings: dict[str, Any],
    own_base: bool,
) -> tuple[Any, list[str]]:
    """Load the bridge.

    Args:
        path: The base model, as transformers takes it.
        device: The device.
        dtype: Floating-point type of the weights.
        adapter: Folder of an adapter to merge.
        settings: The adapter's configuration.
        own_base: Whether the base model is the one that the adapter names.

    Returns:
        The bridge, and notes on how the model was changed.
    """
    import torch
    from transformer_lens.model_bridge import TransformerBridge

    torch_dtype = getattr(torch, dtype)
    if adapter is None and not is_gguf(path):
        model = TransformerBridge.boot_transformers(path, device=device, dtype=torch_dtype)
        return model, []
    wrapped, tokenizer, notes = _hugging_face(path, torch_dtype, settings if own_base else {})
    if adapter is not None:
        wrapped, tokenizer = _merged(wrapped, tokenizer, path, adapter)
        notes.append(
            f"The adapter {adapter} ({settings.get('peft_type', 'PEFT')}) is merged into the "
            f"weights of {path}: the merged model is explained."
        )
        trained_on = settings.get("base_model_name_or_path")
        if not own_base and trained_on and Path(trained_on).name != Path(path).name:
            notes.append(
                Message(
                    f"The adapter was made for {trained_on}, and ",
                    Argument("model"),
                    f" is {path}.",
                )
            )
    model = TransformerBridge.boot_transformers(
        path,
        hf_model=wrapped.to(device).eval(),
        tokenizer=tokenizer,
        device=device,
        dtype=torch_dtype,
    )
    if adapter is not None:
        model.cfg.model_name = f"{Path(path).name} + {Path(adapter).name}"
    return model, notes


def _hugging_face(path: str, dtype: Any, settings: dict[str, Any]) -> tuple[Any, Any, list[str]]:
    """Load a model of transformers, the tokenizer in a GGUF file, and notes."""
    from transformers import AutoModelForCausalLM

    if not is_gguf(path):
        revision = settings.get("revision") if not is_local(path) else None
        options = {"revision": revision} if revision else {}
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options), None, []
    file = Path(path)
    options = {"gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(str(file.parent), dtype=dtype, **options)
    if hasattr(model.config, "quantization_config"):  # the weights are dequantised by now
        del model.config.quantization_config
    tokenizer = _tokenizer(str(file.parent), **options)
    name = str(dtype).removeprefix("torch.")
    return model, tokenizer, [f"The weights of {file.name} were dequantised to {name}."]


def _tokenizer(path: str, **options: Any) -> Any:
    """Load a tokenizer as TransformerLens does."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, add_bos_token=True, **options)
    except ValueError:
        return AutoTokenizer.from_pretrained(path, **options)


def _adapter_settings(adapter: str) -> dict[str, Any]:
    """Read adapter_config.json.

    Raises:
        CliError: There is no adapter, or peft is missing.
    """
    folder = Path(adapter).expanduser()
    if not folder.is_dir():
        raise CliError(
            Code.MODEL,
            f"There is no folder {adapter}. --adapter takes the folder that a PeftModel's "
            "save_pretrained wrote.",
        )
    file = folder / _ADAPTER
    if not file.is_file():
        problem = f"The folder {adapter} holds no adapter: there is no {_ADAPTER} in it. "
        if (folder / "config.json").is_file():
            model = Argument("model", adapter)
            raise CliError(Code.MODEL, Message(problem, "It holds a whole model: ", model, "."))
        raise CliError(
            Code.MODEL, f"{problem}Give the folder that a PeftModel's save_pretrained wrote."
        )
    _require_package("peft", "adapters", "An adapter")
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CliError(Code.MODEL, f"{file} cannot be read: {error}") from error


def _merged(model: Any, tokenizer: Any, base: str, adapter: str) -> tuple[Any, Any]:
    """Merge an adapter into the weights, and take its tokenizer if it has one.

    Raises:
        CliError: The adapter does not fit the model, or cannot be merged.
    """
    from peft import PeftModel

    folder = Path(adapter).expanduser()
    if getattr(model, "is_quantized", False) and not is_gguf(base):
        raise CliError(
            Code.MODEL,
            Message(
                f"The base model {base} is quantised, so an adapter cannot be merged into it "
                "exactly. Give the unquantised model with ",
                Argument("model"),
                ".",
            ),
        )
    if any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json")):
        tokenizer = _tokenizer(str(folder))
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted = PeftModel.from_pretrained(model, str(folder))
    # peft reports keys that are missing by a warning alone, without a class of its own.
    if missing := next((w for w in caught if "missing adapter keys" in str(w.message)), None):
        raise CliError(
            Code.MODEL,
            f"The adapter {adapter} does not fit {base}: {str(missing.message)[:200]}",
        )
    if not hasattr(adapted.base_model, "merge_and_unload"):
        kind = adapted.active_peft_config.peft_type
        raise CliError(
            Code.MODEL,
            f"The adapter {adapter} ({getattr(kind, 'value', kind)}) cannot be merged into the "
            "weights: it adds virtual tokens, which no token of the prompt stands for. Only "
            "adapters of weights, such as LoRA, can be explained.",
        )
    return adapted.merge_and_unload(), tokenizer


def why_not_loaded(name: str, error: Exception) -> str:
    """Explain why a model could not be loaded, and what to do.

    Args:
        name: Folder, name on the hub, or GGUF file.
        error: What loading it raised.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if not is_local(name) and _caused_by(error, LocalEntryNotFoundError, OfflineModeIsEnabled):
        return (
            f"{name} is neither a folder nor among the models downloaded before, and the Hugging "
            "Face hub does not answer. Go online for the first use, check the spelling, or give "
            "the folder of a local copy."
        )
    if is_out_of_memory(error):
        return f"{name} does not fit into memory. Try --dtype bfloat16, or --device cpu."
    if _caused_by(error, GatedRepoError):
        return (
            f"{name} is a gated model. Ask for access on its page on the Hugging Face hub, then "
            "log in once: hf auth login."
        )
    if method := _quantiser(name):
        return (
            f"{name} is a checkpoint quantised by {method}, and cannot be loaded: {first.strip()} "
            f"({type(error).__name__}). Relevance needs weights that can be read as numbers: give "
            "the unquantised model."
        )
    if is_gguf(name):
        return (
            f"{name} cannot be loaded: {first.strip()} ({type(error).__name__}). transformers "
            "reads GGUF files of some architectures only; give the folder of the model that it "
            "was made from."
        )
    remedy = (
        "Is the folder complete (config.json, weights, tokenizer)?"
        if is_local(name)
        else "Check the name, or give the folder of a local copy."
    )
    return f"{name} cannot be loaded: {first.strip()} ({type(error).__name__}). {remedy}"


def _caused_by(error: BaseException | None, *kinds: type[BaseException]) -> bool:
    """Whether an error, or one that it was raised from, is of one of these classes."""
    while error is not None:
        if isinstance(error, kinds):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def _quantiser(name: str) -> str:
    """The method by which a folder's weights are quantised, by its config.json, or ""."""
    file = Path(name).expanduser() / "config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8")).get("quantization_config") or {}
        return str(settings.get("quant_method") or "")
    except (OSError, ValueError, AttributeError):
        return ""
