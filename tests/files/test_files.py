"""Files are written whole or not at all, whatever they hold."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tl_contrastive_lrp.errors import FileFormatError
from tl_contrastive_lrp.files import (
    FileKind,
    atomic_path,
    read_result,
    rebuilding_from,
    save_html,
    why_not_a_page,
    write_result,
)

KIND = FileKind("tl_contrastive_lrp.test", 1, "the test")


def test_a_file_appears_when_the_block_is_done(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert temporary.parent == tmp_path
        assert not path.exists()
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("named", [False, True])
def test_a_failure_keeps_the_older_file_and_nothing_else(tmp_path: Path, named: bool) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    own = tmp_path / "a.part" if named else None

    def interrupted() -> None:
        with atomic_path(path, own) as temporary:
            assert own in (None, temporary)
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    path, link = tmp_path / "real" / "a.txt", tmp_path / "link.txt"
    path.write_text("old")
    link.symlink_to(path)
    with atomic_path(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink()
    assert path.read_text() == "new"


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    for write in (
        lambda path: save_html(path, "x"),
        lambda path: write_result(path, KIND, {"x": torch.ones(1)}, {}),
    ):
        with pytest.raises(IsADirectoryError, match="give a file name such as"):
            write(tmp_path)
        with pytest.raises(FileNotFoundError, match="mkdir -p"):
            write(tmp_path / "no" / "file")
    assert os.listdir(tmp_path) == []


def test_results_are_read_back_exactly_or_refused(tmp_path: Path) -> None:
    x = torch.randn(3, 4)
    tensors = {"x": x, "view": x[0], "transposed": x.T, "absent": None}
    path = write_result(tmp_path / "r", KIND, tensors, {"n": [1, "a"]})
    loaded, data = read_result(path, KIND)
    assert data == {"n": [1, "a"]}
    assert loaded.keys() == {"x", "view", "transposed"}
    for name, tensor in loaded.items():
        assert torch.equal(tensor, tensors[name])  # type: ignore[arg-type]
    for kind, message in (
        (FileKind("tl_contrastive_lrp.other", 1, "the test"), "holds no test"),
        (FileKind("tl_contrastive_lrp.test", 2, "the test"), "format version 1"),
    ):
        with pytest.raises(FileFormatError, match=message):
            read_result(path, kind)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(FileFormatError, match="no readable safetensors file"):
        read_result(path, KIND)
    with pytest.raises(FileFormatError, match="is damaged"), rebuilding_from(path):
        raise KeyError("tokens")


def test_names_of_pages() -> None:
    assert why_not_a_page(Path("Qwen3-0.6B")) is None
    assert "r.html" in str(why_not_a_page(Path("r.png")))
