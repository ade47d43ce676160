"""Loading the model that was asked for, without other libraries' chatter.

A folder, a name on the hub, a GGUF file (its weights dequantised), each with or without an adapter
(merged into the weights): what is explained is always one plain model, and notes say what was done.
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

from .errors import CliError, Code


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Nothing from other libraries on stdout or stderr: no bars, log lines or warnings."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with (
        warnings.catch_warnings(),
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        import logging

        from transformers.utils import logging as chatter

        level, bars = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
        disabled = logging.root.manager.disable
        chatter.set_verbosity_error()
        chatter.disable_progress_bar()
        logging.disable(logging.WARNING)  # TransformerLens logs on the root logger
        try:
            yield
        finally:
            logging.disable(disabled)
            chatter.set_verbosity(level)
            if bars:
                chatter.enable_progress_bar()


def is_local(name: str) -> bool:
    """Whether ``name`` is a folder or file here rather than a name on the hub."""
    return Path(name).expanduser().exists()


def is_gguf(name: str) -> bool:
    """Whether ``name`` is a GGUF file here."""
    path = Path(name).expanduser()
    return path.suffix.lower() == ".gguf" and path.is_file()


_ADAPTER = "adapter_config.json"


def _needs(package: str, extra: str, what: str) -> None:
    if find_spec(package) is None:
        raise CliError(
            Code.MODEL,
            f'{what} needs the package {package}. Type: pip install "tl_contrastive_lrp[{extra}]"',
        )


def checked_name(name: str) -> str:
    """The folder or the name on the hub, as transformers takes it.

    Raises:
        CliError: there is no such folder or file, or it holds no model.
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
        if adapter:  # transformers would leave it out without a word
            _needs("peft", "adapters", f"The folder {name} holds an adapter, too, which")
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
    """The device to use; by default an NVIDIA GPU where there is one.

    Raises:
        CliError: it is not there, or cannot hold ``dtype``.
    """
    import torch

    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise CliError(Code.MODEL, "torch finds no CUDA device here. Use --device cpu.")
    if name == "mps":
        _check_mps(dtype)
    return name or ("cuda" if there else "cpu")


def _check_mps(dtype: str) -> None:
    """Apple's GPU: is it there, does this torch compute rightly on it, and does it have the type?

    Raises:
        CliError: no.
    """
    import torch

    if not torch.backends.mps.is_available():
        why = (
            "it needs a Mac with an Apple GPU, and a macOS that this torch works with"
            if torch.backends.mps.is_built()
            else "this torch is built without it"
        )
        raise CliError(Code.MODEL, f"torch finds no Apple GPU (MPS) here: {why}. Use --device cpu.")
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
    """A model as a ``TransformerBridge``, the name it goes by, and how it was made."""

    bridge: Any
    name: str
    notes: tuple[str, ...] = ()


def load_model(
    name: str | None, device: str | None, dtype: str, adapter: str | None = None
) -> Loaded:
    """The model in evaluation mode.

    Args:
        name: Folder, name on the hub, or GGUF file; None only with an adapter, whose own
            configuration names the base model then.
        device: "cpu", "cuda" or "mps"; None: a GPU where there is one.
        dtype: Of the weights.
        adapter: Folder of a PEFT adapter to merge into the weights.

    Raises:
        CliError: it does not exist, cannot be loaded, or has no tokenizer; no such device; a
            package that is missing.
    """
    settings = {} if adapter is None else _adapter_settings(adapter)
    base = name or str(settings.get("base_model_name_or_path") or "")
    if not base:
        raise CliError(
            Code.MODEL, f"{adapter}/{_ADAPTER} names no base model. Give it with --model."
        )
    try:
        path = str(Path(base).expanduser()) if is_gguf(base) else checked_name(base)
    except CliError as error:
        if name is not None:
            raise
        raise CliError(
            error.code,
            f"{error} ({base} is the base model that {adapter}/{_ADAPTER} names; --model gives "
            "another.)",
        ) from error
    if is_gguf(path):
        _needs("gguf", "gguf", "A GGUF file")
    device = checked_device(device, dtype)
    notes: list[str] = []
    try:
        with quiet_libraries():
            model, notes = _booted(path, device, dtype, adapter, settings, name is None)
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
    shown = base if adapter is None else f"{base} + {adapter}"
    return Loaded(model, shown, tuple(notes))


def _booted(
    path: str,
    device: str,
    dtype: str,
    adapter: str | None,
    settings: dict[str, Any],
    own_base: bool,
) -> tuple[Any, list[str]]:
    """The bridge, and what was done on the way."""
    import torch
    from transformer_lens.model_bridge import TransformerBridge

    kind = getattr(torch, dtype)
    if adapter is None and not is_gguf(path):
        model = TransformerBridge.boot_transformers(path, device=device, dtype=kind)
        return model, []
    wrapped, tokenizer, notes = _hugging_face(path, kind, settings if own_base else {})
    if adapter is not None:
        wrapped, tokenizer = _merged(wrapped, tokenizer, path, adapter)
        notes.append(
            f"The adapter {adapter} ({settings.get('peft_type', 'PEFT')}) is merged into the "
            f"weights of {path}: the merged model is explained."
        )
        trained_on = settings.get("base_model_name_or_path")
        if not own_base and trained_on and Path(trained_on).name != Path(path).name:
            notes.append(f"The adapter was made for {trained_on}, and --model is {path}.")
    model = TransformerBridge.boot_transformers(
        path, hf_model=wrapped.to(device).eval(), tokenizer=tokenizer, device=device, dtype=kind
    )
    if adapter is not None:
        model.cfg.model_name = f"{Path(path).name} + {Path(adapter).name}"
    return model, notes


def _hugging_face(path: str, dtype: Any, settings: dict[str, Any]) -> tuple[Any, Any, list[str]]:
    """A model of transformers, the tokenizer beside a GGUF file's weights, and notes."""
    from transformers import AutoModelForCausalLM

    if not is_gguf(path):
        revision = settings.get("revision") if not is_local(path) else None
        options = {"revision": revision} if revision else {}
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options), None, []
    file = Path(path)
    options = {"gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(str(file.parent), dtype=dtype, **options)
    if hasattr(model.config, "quantization_config"):  # it is plain numbers by now
        del model.config.quantization_config
    tokenizer = _tokenizer(str(file.parent), **options)
    name = str(dtype).removeprefix("torch.")
    return model, tokenizer, [f"The weights of {file.name} were dequantised to {name}."]


def _tokenizer(path: str, **options: Any) -> Any:
    """As TransformerLens loads it."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, add_bos_token=True, **options)
    except ValueError:
        return AutoTokenizer.from_pretrained(path, **options)


def _adapter_settings(adapter: str) -> dict[str, Any]:
    """What adapter_config.json says.

    Raises:
        CliError: no adapter is there, or peft is missing.
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
        whole = (folder / "config.json").is_file()
        raise CliError(
            Code.MODEL,
            f"The folder {adapter} holds no adapter: there is no {_ADAPTER} in it. "
            + (f"It holds a whole model: --model {adapter}." if whole else
               "Give the folder that a PeftModel's save_pretrained wrote."),
        )  # fmt: skip
    _needs("peft", "adapters", "An adapter")
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CliError(Code.MODEL, f"{file} cannot be read: {error}") from error


def _merged(model: Any, tokenizer: Any, base: str, adapter: str) -> tuple[Any, Any]:
    """The model with the adapter in its weights, and the tokenizer if the adapter brings one."""
    from peft import PeftModel

    folder = Path(adapter).expanduser()
    if getattr(model, "is_quantized", False) and not is_gguf(base):
        raise CliError(
            Code.MODEL,
            f"The base model {base} is quantised, so an adapter cannot be merged into it exactly. "
            "Give the unquantised model with --model.",
        )
    if any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json")):
        tokenizer = _tokenizer(str(folder))
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        adapted = PeftModel.from_pretrained(model, str(folder))
    if missing := next((w for w in said if "missing adapter keys" in str(w.message)), None):
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
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if "couldn't connect" in first or "offline mode" in str(error).lower():
        return (
            f"{name} is neither a folder nor among the models downloaded before, and the Hugging "
            "Face hub does not answer. Go online for the first use, check the spelling, or give "
            "the folder of a local copy."
        )
    if "out of memory" in first.lower():
        return f"{name} does not fit into memory. Try --dtype bfloat16, or --device cpu."
    if "gated repo" in str(error):
        return (
            f"{name} is a gated model. Ask for access on its page on the Hugging Face hub, then "
            "log in once: hf auth login."
        )
    if by := _quantiser(name):
        return (
            f"{name} is a checkpoint quantised by {by}, and cannot be loaded: {first.strip()} "
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


def _quantiser(name: str) -> str:
    """How config.json says that a folder's weights are quantised, or ""."""
    file = Path(name).expanduser() / "config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8")).get("quantization_config") or {}
        return str(settings.get("quant_method") or "")
    except (OSError, ValueError, AttributeError):
        return ""
