"""Messages that know the arguments they name, and which errors mean that memory ran out."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest
import torch

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.cli.errors import in_shell, message_of
from tl_contrastive_lrp.engine.memory import MemoryPlan, require_plain_fits, require_room_for_edges
from tl_contrastive_lrp.errors import (
    Argument,
    FileFormatError,
    LrpError,
    Message,
    ModelStateError,
    NonFiniteError,
    OutOfMemoryError,
    TokenError,
    VersionError,
    Wording,
    is_out_of_memory,
)

PLAIN = Argument("memory", "plain")


def test_a_message_is_a_string_in_pythons_spelling() -> None:
    message = Message("Use ", PLAIN, ", or give ", Argument("top_k"), ".")
    assert message == "Use memory='plain', or give top_k."
    assert f"So: {message}" == "So: Use memory='plain', or give top_k."
    for kind in (ModelStateError, TokenError, VersionError, FileFormatError):
        assert str(kind(message)) == message


@pytest.mark.parametrize(
    ("argument", "typed"),
    [
        (PLAIN, "--memory plain"),
        (Argument("mass", 0.85), "--mass 0.85"),
        (Argument("top_k"), "--top-k"),
        (Argument("checkpoint_dir"), "--checkpoint-dir"),
        (Argument("checkpoint_dir", "my runs"), "--checkpoint-dir 'my runs'"),
        (Argument("pos", -2), "--pos=-2"),
        (Argument("prepend_bos", True), "--bos"),
        (Argument("prepend_bos", False), "--no-bos"),
    ],
)
def test_the_command_line_spells_arguments_as_options(argument: Argument, typed: str) -> None:
    message = Message("Use ", argument, Wording(" in Python", " in the shell"), ".")
    assert in_shell(message) == f"Use {typed} in the shell."
    assert str(message) == f"Use {argument} in Python."
    assert message_of(ModelStateError(message)) == in_shell(message)


def test_messages_within_messages_stay_data() -> None:
    outer = Message("First. ", Message("Use ", PLAIN, "."), " Last.")
    assert outer == "First. Use memory='plain'. Last."
    assert in_shell(outer) == "First. Use --memory plain. Last."


def test_messages_survive_another_process() -> None:
    error = pickle.loads(pickle.dumps(ModelStateError(Message("Use ", PLAIN, "."))))
    assert str(error) == "Use memory='plain'."
    assert message_of(error) == "Use --memory plain."


def test_refusals_for_want_of_memory_say_what_to_type() -> None:
    plan = MemoryPlan(tile=16, plain_bytes=1 << 40, free_bytes=1 << 30)
    with pytest.raises(ModelStateError, match="give memory='plain' to try") as refused:
        require_plain_fits(plan, "It keeps no keys.")
    assert "give --memory plain to try" in message_of(refused.value)
    with pytest.raises(ModelStateError, match=r"with mass=0\.85, or give threshold or") as refused:
        require_room_for_edges(plan, 32, 1 << 17)
    assert "with --mass 0.85, or give --threshold or --top-k." in message_of(refused.value)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OutOfMemoryError("too large"),
        torch.OutOfMemoryError("full"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_what_means_that_memory_ran_out(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("boom"),
        RuntimeError("tensors share memory"),
        ValueError("out of memory"),
        ModelStateError("a hook said: out of memory"),
        KeyboardInterrupt(),
    ],
)
def test_what_does_not(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def test_torchs_own_failed_allocation_is_recognised() -> None:
    with pytest.raises(RuntimeError) as failed:
        torch.empty(1 << 58)
    assert is_out_of_memory(failed.value), str(failed.value)


def test_errors_are_also_the_built_in_error_that_they_are_a_kind_of() -> None:
    for kind, built_in in ((NonFiniteError, ValueError), (OutOfMemoryError, MemoryError)):
        assert issubclass(kind, LrpError)
        assert issubclass(kind, built_in)


@pytest.mark.parametrize(
    ("value", "words"),
    [(5, "an int"), ("x", "a str"), (None, "None"), (object(), "an object"), ({}, "a dict")],
)
def test_types_have_their_article(value: object, words: str) -> None:
    assert clrp.errors.a_kind(value) == words


def test_no_message_of_a_type_has_a_fixed_article() -> None:
    """ "a int" comes from an article in front of a type's name, which ``a_kind`` knows."""
    package = Path(clrp.__file__).parent
    fixed = re.compile(r"\ba \{type\(")
    found = [p.name for p in package.rglob("*.py") if fixed.search(p.read_text(encoding="utf-8"))]
    assert found == []
