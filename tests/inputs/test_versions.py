"""A TransformerLens that is too old is refused at the first use, with what to type instead."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.inputs import versions

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _ask_again():
    versions.require_transformer_lens.cache_clear()
    yield
    versions.require_transformer_lens.cache_clear()


def _pretend(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr(versions, "installed_version", lambda: found)


def _range_in_metadata() -> tuple[str, str]:
    """(lower, upper) bound of transformer_lens in pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.findall(r'^\s*"transformer_lens>=([\d.]+),<([\d.]+)",$', text, re.MULTILINE)
    assert len(found) == 1
    return found[0]


def test_the_metadata_says_what_the_code_checks():
    lower, upper = _range_in_metadata()
    assert tuple(map(int, lower.split("."))) == versions.MINIMUM
    with pytest.raises(ImportError, match=re.escape(f'"transformer_lens>={lower},<{upper}"')):
        raise versions._refusal("x")


def test_the_installed_one_and_newer_ones_pass(monkeypatch):
    versions.require_transformer_lens()
    lower = ".".join(map(str, versions.MINIMUM))
    for found in (lower, f"{lower}.1", "4.3.0", "4.10.0", "5.0.0rc1", "10.0"):
        _pretend(monkeypatch, found)
        versions.require_transformer_lens.cache_clear()
        versions.require_transformer_lens()


@pytest.mark.parametrize("found", ["0.2.0", "1.19.0", "2.18.0", "3.0.0", "3.3.0", "3.6.0", "3.8.1"])
def test_an_old_one_is_refused_by_its_number(monkeypatch, found):
    _pretend(monkeypatch, found)
    lower, upper = _range_in_metadata()
    with pytest.raises(ImportError) as refused:
        versions.require_transformer_lens()
    message = str(refused.value)
    assert f"found {found}" in message
    assert f"{lower} or newer" in message
    assert f'pip install --upgrade "transformer_lens>={lower},<{upper}"' in message
    assert refused.value.name == "transformer_lens"


def test_a_source_tree_without_a_number_passes(monkeypatch):
    def none() -> str:
        raise PackageNotFoundError("transformer_lens")

    monkeypatch.setattr(versions, "installed_version", none)
    versions.require_transformer_lens()  # importable, but no metadata
    for found in ("0.0.0", "unknown"):
        _pretend(monkeypatch, found)
        versions.require_transformer_lens.cache_clear()
        versions.require_transformer_lens()


def test_a_missing_one_is_named(monkeypatch):
    def none() -> str:
        raise PackageNotFoundError("transformer_lens")

    monkeypatch.setattr(versions, "installed_version", none)
    monkeypatch.setattr("importlib.util.find_spec", dict[str, None]().get)
    with pytest.raises(ImportError, match="not installed"):
        versions.require_transformer_lens()


def _with_fake(tmp_path: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` where the first TransformerLens on the path says it is 3.0.0."""
    (tmp_path / "transformer_lens").mkdir()
    (tmp_path / "transformer_lens" / "__init__.py").touch()
    info = tmp_path / "transformer_lens-3.0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: transformer-lens\nVersion: 3.0.0\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
    )  # fmt: skip


@pytest.mark.parametrize("name", sorted(set(clrp.__all__) & {"lrp", "attribute", "RULE_SETS"}))
def test_the_first_name_imported_is_refused_before_torch_is(tmp_path, name):
    code = (
        "import sys\n"
        "try:\n"
        f"    from tl_contrastive_lrp import {name}\n"
        "except ImportError as error:\n"
        "    print(error)\n"
        "print(sorted({'torch', 'transformer_lens'} & set(sys.modules)))\n"
    )
    done = _with_fake(tmp_path, code)
    assert done.returncode == 0, done.stderr
    message, modules = done.stdout.splitlines()
    assert "found 3.0.0" in message
    assert modules == "[]"


def test_the_command_line_refuses_too(tmp_path):
    done = _with_fake(
        tmp_path,
        "import sys; sys.argv = ['x', 'demo']; from tl_contrastive_lrp.cli import main; main()",
    )
    assert done.returncode == 3  # as for a model that cannot be loaded
    assert "found 3.0.0" in done.stderr
    assert "Traceback" not in done.stderr
    assert 'pip install --upgrade "transformer_lens' in done.stderr.replace("\n", " ")


def test_importing_the_package_asks_for_nothing():
    """Import stays cheap: metadata is read at the first use of a name."""
    code = (
        "import sys, tl_contrastive_lrp\n"
        "print('importlib.metadata' in sys.modules, 'transformer_lens' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.split() == ["False", "False"]
