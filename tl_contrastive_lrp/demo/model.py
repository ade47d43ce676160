"""Boot the packaged demo model, offline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformer_lens.model_bridge import TransformerBridge


def demo_dir() -> Path:
    """Folder with the demo model in Hugging Face's format: give it to ``boot_transformers``.

    Raises FileNotFoundError where the package is not unpacked on disk or lacks its data.
    """
    folder = Path(str(files(__package__).joinpath("data")))
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"the demo model is not in {folder}. Install tl_contrastive_lrp from a complete "
            "wheel, unpacked (not from inside a zip file)."
        )
    return folder


@contextmanager
def _quiet_and_offline() -> Iterator[None]:
    """No progress bar on stderr and no question to any hub; both as before afterwards."""
    from huggingface_hub import constants
    from transformers.utils import logging

    bars, offline = logging.is_progress_bar_enabled(), constants.HF_HUB_OFFLINE
    logging.disable_progress_bar()
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        if bars:
            logging.enable_progress_bar()


def load_demo_model(
    device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> TransformerBridge:
    """The demo model as a TransformerLens bridge, in eval mode, without network.

    device: as in ``boot_transformers`` (None: TransformerLens chooses).
    dtype: of the weights in memory; None is float32. The file holds float16 values.
    Its tokenizer has no BOS token: ``model.to_tokens(case.prompt)`` with default arguments gives
    the ids the cases were recorded with.
    Raises FileNotFoundError if the packaged model is missing (see `demo_dir`).
    """
    folder = demo_dir()
    # heavy imports only now, so that importing the package stays cheap
    import torch
    from transformer_lens.model_bridge import TransformerBridge

    with _quiet_and_offline():
        model = TransformerBridge.boot_transformers(
            str(folder), device=device, dtype=torch.float32 if dtype is None else dtype
        )
    model.cfg.model_name = "demo model"  # not the folder it was loaded from
    model.eval()
    return model
