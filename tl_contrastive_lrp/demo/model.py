"""Loading the demo model of the package, offline."""

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
    """Find the folder of the demo model, in Hugging Face's format.

    Returns:
        The folder, which ``boot_transformers`` takes.

    Raises:
        FileNotFoundError: The package is not unpacked on disk, or lacks its data.

    Example:
        >>> (clrp.demo.demo_dir() / "config.json").is_file()
        True
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
    """Turn off progress bars and requests to the hub while the block runs."""
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
    """Load the demo model as a TransformerLens bridge in evaluation mode, without network.

    Its tokenizer has no BOS token: ``model.to_tokens(case.prompt)`` gives the ids with which the
    cases were recorded.

    Args:
        device: As in ``boot_transformers``; None lets TransformerLens choose.
        dtype: Floating-point type of the weights in memory; None is float32. The file holds
            float16 values.

    Returns:
        A ``TransformerBridge``.

    Raises:
        FileNotFoundError: The model is missing from this installation, see ``demo_dir``.

    Example:
        >>> model = clrp.load_demo_model(device="cpu")
        >>> logits = model(case.prompt)[0, -1]
        >>> delta = logits[case.target_id] - logits[case.contrast_id]
        >>> abs(delta.item() - case.delta) < 0.01
        True
    """
    folder = demo_dir()
    # Imported here, so that importing the package stays cheap.
    import torch
    from transformer_lens.model_bridge import TransformerBridge

    with _quiet_and_offline():
        model = TransformerBridge.boot_transformers(
            str(folder), device=device, dtype=torch.float32 if dtype is None else dtype
        )
    model.cfg.model_name = "demo model"  # instead of the folder
    model.eval()
    return model
