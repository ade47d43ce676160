"""The command line in this process, on a tiny local model.

A plugin that ``tests/conftest.py`` names.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge
from truth import families

from support.cli_runs import TEMPLATE, Ran, Run
from tl_contrastive_lrp.cli import main as cli_main
from tl_contrastive_lrp.cli import retype as cli_command


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """The command in this process, in an empty folder, as it would run in a pipe."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def call(*arguments: object, stdin: bytes = b"") -> Ran:
        monkeypatch.setattr(sys, "argv", [cli_command.PROGRAM, *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli_main()
        captured = capsys.readouterr()
        code = left.value.code
        return Ran(code if isinstance(code, int) else int(code is not None), *captured)

    return call


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that puts BOS first, with a chat template."""
    path = families.save_family("llama", tmp_path_factory.mktemp("cli") / "llama")
    tokenizer = families.make_tokenizer(bos_first=True)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def bridge(folder: Path) -> Any:
    return TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=torch.float32)
