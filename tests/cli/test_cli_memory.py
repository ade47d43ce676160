"""Long prompts on the command line: tiles, what is printed about memory, stopping and resuming."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.cli_runs import FILE, MODEL, PROMPT, ROOT, USAGE, Ran, Run, asked, typed_next, words

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.cli.errors import Code
from tl_contrastive_lrp.engine import memory
from tl_contrastive_lrp.engine.tiled import backward as tiled_backward
from tl_contrastive_lrp.engine.tiled import prefill as tiles
from tl_contrastive_lrp.errors import NotTileableError
from tl_contrastive_lrp.hooks.user_hooks import as_own

TILED = ("--memory", "tiled", "--tile", 4)


def explained(folder: Path, *more: object) -> tuple[object, ...]:
    return ("explain", *asked(folder, *more)[1:])


def relevance(done: Ran) -> list[float]:
    assert done.code == 0, done
    return [row["relevance"] for row in done.json["tokens"]]


def little(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: size)  # noqa: ARG005


# ---- plain or tiled, and what is printed about it ----------------------------------------


@pytest.mark.parametrize("tiles", [(), TILED])
def test_attention_is_computed_as_asked_and_reported(
    tiles: tuple[object, ...], run: Run, folder: Path
) -> None:
    eager, fused = (
        run(*explained(folder, *tiles, "--attention", kind, "--json"))
        for kind in ("eager", "fused")
    )
    assert (eager.json["attention"], fused.json["attention"]) == ("eager", "fused")
    assert relevance(fused) == pytest.approx(relevance(eager), abs=1e-5)
    assert fused.json["memory"]["way"] == eager.json["memory"]["way"]
    assert fused.json["memory"]["plain_bytes"] < eager.json["memory"]["plain_bytes"]
    edges = [
        run("graph", *asked(folder, *tiles, "--attention", kind, "--json")[1:])
        for kind in ("eager", "fused")
    ]
    mass = [done.json["full"]["mass"] for done in edges]
    assert mass[1] == pytest.approx(mass[0], rel=1e-4)
    if tiles:
        done = run(*explained(folder, *tiles, "--attention", "fused"))
        assert "Memory: tiled (tile 4), attention fused; the plain engine" in done.out
    assert run(*explained(folder, "--attention", "flash")).code == USAGE


def test_tiles_give_the_same_relevance_and_are_reported(
    run: Run, folder: Path, bridge: Any
) -> None:
    n = bridge.to_tokens(PROMPT).shape[1]
    plain, tiled = (run(*explained(folder, *options, "--json")) for options in ((), TILED))
    assert relevance(tiled) == pytest.approx(relevance(plain), abs=1e-5)
    assert (plain.err, tiled.err) == ("", "")
    assert plain.json["memory"]["way"] == "plain"
    assert tiled.json["memory"]["way"] == "tiled (tile 4)"
    need = memory.plain_bytes(bridge, n)
    assert tiled.json["memory"]["plain_bytes"] == plain.json["memory"]["plain_bytes"] == need
    assert tiled.json["memory"]["free_bytes"] > 1 << 20
    done = run(*explained(folder, *TILED))
    description = f"Memory: tiled (tile 4); the plain engine needs about {memory.gib(need)}, "
    assert description in done.out
    assert description in done.err
    assert (
        done.err.index("Prompt:") < done.err.index(description) < done.err.index("Blocks × tiles:")
    )
    quiet = run(*explained(folder, *TILED, "--quiet"))
    assert (quiet.code, quiet.err) == (0, "")
    assert "Memory" not in run(*explained(folder)).out
    assert (
        "Memory: plain; the plain engine needs" in run(*explained(folder, "--memory", "plain")).out
    )


def test_where_plain_does_not_fit_nothing_is_run_plainly(
    run: Run, folder: Path, bridge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither for the candidates nor for the relevance: the largest pattern is a tile's."""
    seen: list[int] = []
    little(monkeypatch, memory.plain_bytes(bridge, 40) // 2)
    monkeypatch.setattr(memory, "_TILES", (16, 1024))
    from transformer_lens.model_bridge import TransformerBridge

    boot = TransformerBridge.boot_transformers

    def booted(*arguments: Any, **options: Any) -> Any:
        model = boot(*arguments, **options)
        model.blocks[0].attn.hook_pattern.add_hook(
            as_own(lambda x, hook: seen.append(x.shape[-2]))  # noqa: ARG005
        )
        return model

    monkeypatch.setattr(TransformerBridge, "boot_transformers", booted)
    prompt = " a b c" * 13
    done = run("explain", "--model", folder, "--prompt", prompt, "--contrast", " b", "--json")
    assert done.code == 0
    assert done.json["memory"]["way"] == "tiled (tile 16)"
    assert max(seen) == 16
    assert sum(seen) > 2 * 40


def test_what_does_not_run_in_tiles(
    run: Run, folder: Path, bridge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise NotTileableError("It keeps no keys.")

    monkeypatch.setattr(tiles, "check_tileable", never)
    monkeypatch.setattr("tl_contrastive_lrp.engine.tiled.run.check_tileable", never)
    for command in (explained(folder, *TILED), asked(folder, *TILED)):
        done = run(*command)
        assert (done.code, done.out) == (MODEL, "")
        assert "cannot run in tiles: It keeps no keys. Use --memory plain, which needs" in done.err
    n = bridge.to_tokens(PROMPT).shape[1]
    little(monkeypatch, memory.plain_bytes(bridge, n))  # tiles would be safer
    done = run(*explained(folder))
    assert done.code == MODEL
    assert "in tiles it cannot run: It keeps no keys. Shorten the prompt, or give --memory" in (
        done.err
    )


@pytest.mark.parametrize("command", ["explain", "graph"])
@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (("--memory", "little"), USAGE, "tiled"),
        (("--tile", 0), USAGE, "--tile"),
        (("--tile", 4, "--memory", "plain"), USAGE, "--tile is for tiles"),
        (("--checkpoint-dir", "c", "--memory", "plain"), USAGE, "--checkpoint-dir is for tiles"),
        (("--checkpoint-dir", "no/c"), FILE, "mkdir -p no"),
        (("--checkpoint-dir", "mine.txt"), FILE, "mine.txt is a file"),
    ],
)
def test_settings_that_are_refused(
    run: Run, folder: Path, command: str, more: tuple[object, ...], code: int, message: str
) -> None:
    Path("mine.txt").write_text("mine")
    done = run(command, *asked(folder, *more)[1:])
    assert done.code == code, done
    assert message in words(done.err.replace("│", " "))
    assert os.listdir() == ["mine.txt"]
    assert Path("mine.txt").read_text() == "mine"


def test_layers_that_skip_blocks_need_the_plain_engine(
    run: Run, folder: Path, bridge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run(*asked(folder, "--layers", "0", *TILED))
    assert done.code == USAGE
    assert "--layers that skip blocks need the plain engine" in words(done.err.replace("│", " "))
    assert run(*asked(folder, "--layers", "0,1", *TILED)).code == 0
    n = bridge.to_tokens(PROMPT).shape[1]
    little(monkeypatch, memory.plain_bytes(bridge, n, graphs=1))
    done = run(*asked(folder, "--layers", "0"))
    assert done.code == MODEL
    assert "--layers that skip blocks need the plain engine. Shorten the prompt" in done.err


def test_the_printed_command_keeps_the_settings(run: Run, folder: Path) -> None:
    common = ("explain", "--model", folder, "--prompt", PROMPT)
    command = typed_next(run(*common, *TILED, "--checkpoint-dir", "c d"))
    assert shlex.split(command)[-6:] == [
        "--memory", "tiled", "--tile", "4", "--checkpoint-dir", "c d",
    ]  # fmt: skip
    assert run(*shlex.split(command)[1:], "--quiet").code == 0
    assert "--memory" not in typed_next(run(*common))


# ---- stopping and going on ---------------------------------------------------------------


def interrupted_at(monkeypatch: pytest.MonkeyPatch, block: int) -> list[int]:
    """Ctrl-C in that block; the blocks that were run are listed."""
    runs: list[int] = []
    layer = tiled_backward.Backward.layer

    def counted(self: Any, at: int, *more: Any) -> Any:
        if at == block:
            raise KeyboardInterrupt
        runs.append(at)
        return layer(self, at, *more)

    monkeypatch.setattr(tiled_backward.Backward, "layer", counted)
    return runs


@pytest.mark.parametrize("command", ["explain", "graph"])
def test_what_was_stopped_goes_on_with_the_same_result(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    typed = (command, *asked(folder)[1:])
    expected = run(*typed, *TILED, "--json").json
    kept = Path("kept") / ("relevance" if command == "explain" else "graph")
    with monkeypatch.context() as stopped:
        assert interrupted_at(stopped, 0) == []
        done = run(*typed, *TILED, "--checkpoint-dir", "kept")
    assert (done.code, done.out) == (Code.INTERRUPTED, "")
    assert f"Finished blocks (1) are kept in {kept}: the same command goes on" in done.err
    assert "Traceback" not in done.err
    assert sorted(path.name for path in kept.iterdir()) == ["block_1.safetensors", "question.json"]
    # Also where it fits without tiles, and with the tile of the run that was begun.
    runs = interrupted_at(monkeypatch, -1)
    reply = run(*typed, "--checkpoint-dir", "kept", "--json").json
    assert runs == [0]
    assert reply["memory"]["way"] == "tiled (tile 4)"
    for key in ("tokens", "delta", "ledger") if command == "explain" else ("paths", "kept"):
        assert reply[key] == expected[key], key


def test_without_a_folder_nothing_is_kept_and_that_is_said(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted_at(monkeypatch, 1)
    done = run(*explained(folder, *TILED, "--out", "r.html", "--save", "r.safetensors"))
    assert (done.code, done.out) == (Code.INTERRUPTED, "")
    assert "Nothing is kept. With --checkpoint-dir FOLDER" in done.err
    assert os.listdir() == []


def test_a_stopped_report_keeps_the_result_that_was_to_be_saved(
    run: Run, folder: Path, bridge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(
        "tl_contrastive_lrp.graph.assembly.attribution_graph.attribution_graph", stop
    )
    done = run(*explained(folder, "--out", "r.html", "--save", "r.safetensors"))
    assert done.code == Code.INTERRUPTED
    assert os.listdir() == ["r.safetensors"]
    saved = clrp.Attribution.load("r.safetensors").tokens
    expected = clrp.attribute(bridge, PROMPT, target=" a", contrast=" b").tokens
    assert saved.tolist() == expected.tolist()


def test_a_folder_belongs_to_one_question_a_kind_of_run(run: Run, folder: Path) -> None:
    kept = ("--checkpoint-dir", "kept", "--quiet")
    assert run(*explained(folder, *TILED, *kept, "--out", "r.html")).code == 0
    assert run(*asked(folder, *TILED, *kept)).code == 0
    assert sorted(os.listdir("kept")) == ["graph", "relevance", "report_graph"]
    done = run(*explained(folder, *TILED, *kept, "--rules", "cplrp"))
    assert (done.code, done.out) == (FILE, "")
    assert "belongs to another run" in done.err
    assert "Give another --checkpoint-dir" in done.err


def test_an_untiled_run_says_that_it_keeps_nothing(run: Run, folder: Path) -> None:
    done = run(*explained(folder, "--checkpoint-dir", "kept"))
    assert done.code == 0
    assert "Note: The run fits into memory without tiles, so it keeps nothing in" in done.err
    assert "--checkpoint-dir; with --memory tiled it would." in done.err
    assert not os.path.exists("kept")
    note = run(*asked(folder, "--checkpoint-dir", "kept", "--json")).json["notes"]
    assert "with --memory tiled it would" in note[0]


@pytest.mark.slow
def test_ctrl_c_in_a_terminal(folder: Path, tmp_path: Path) -> None:
    """The signal itself, in a process of its own, between two blocks or in one."""
    prompt = "a b c d e f g " * 8
    arguments = (
        "explain", "--model", folder, "--prompt", prompt, "--target", "a", "--contrast", "z",
        "--memory", "tiled", "--tile", 1, "--checkpoint-dir", tmp_path / "kept",
    )  # fmt: skip
    command = [sys.executable, "-m", "tl_contrastive_lrp", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        first = tmp_path / "kept" / "relevance" / "block_1.safetensors"
        for _ in range(20000):
            if first.exists() or running.poll() is not None:
                break
            time.sleep(0.005)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
    assert running.returncode == Code.INTERRUPTED, err.decode()
    assert out == b""
    assert "Interrupted." in err.decode()
    assert re.search(r"Finished blocks \([12]\) are kept in", err.decode())
    assert "Traceback" not in err.decode()
