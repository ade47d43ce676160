"""Loading the model that was asked for, without other libraries' chatter."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from .exit import CliError, Code


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
    """Whether ``name`` is a folder here rather than a name on the hub."""
    return Path(name).expanduser().is_dir()


def checked_name(name: str) -> str:
    path = Path(name).expanduser()
    if path.is_dir():
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


def load_model(name: str, device: str | None, dtype: str) -> Any:
    """The model as a ``TransformerBridge`` in evaluation mode.

    Raises:
        CliError: it does not exist, cannot be loaded, or has no tokenizer; no such device.
    """
    path = checked_name(name)
    device = checked_device(device, dtype)
    try:
        with quiet_libraries():
            import torch
            from transformer_lens.model_bridge import TransformerBridge

            model: Any = TransformerBridge.boot_transformers(
                path, device=device, dtype=getattr(torch, dtype)
            )
    except Exception as error:
        raise CliError(Code.MODEL, why_not_loaded(name, error)) from error
    if model.tokenizer is None:
        raise CliError(
            Code.MODEL,
            f"{name} has no tokenizer, so text cannot become tokens. Save one there: "
            "tokenizer.save_pretrained(folder).",
        )
    model.eval()
    return model


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
    remedy = (
        "Is the folder complete (config.json, weights, tokenizer)?"
        if is_local(name)
        else "Check the name, or give the folder of a local copy."
    )
    return f"{name} cannot be loaded: {first.strip()} ({type(error).__name__}). {remedy}"
