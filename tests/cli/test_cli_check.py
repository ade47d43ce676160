"""``check``: is a model covered, and right; from its folder, or from its config alone."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.cli_runs import MODEL, USAGE, Run
from truth.families import make_config

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.cli import random_model
from tl_contrastive_lrp.hooks.sites import ACTIVATIONS


@pytest.fixture
def config_folder(tmp_path: Path) -> Path:
    """A folder that holds config.json and nothing else."""
    path = tmp_path / "only config"
    config = make_config("qwen3")
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(path)
    return path


def test_a_covered_model_is_listed(run: Run, folder: Path) -> None:
    done = run("check", folder)
    assert done.code == 0
    first, *rest = done.out.splitlines()
    assert first == f"{folder} (LlamaForCausalLM): covered, rules {clrp.DEFAULT_RULES}, float32"
    for component in ("blocks.0-1.attn", "blocks.0-1.mlp", "blocks.0-1.ln1", "ln_final"):
        assert any(line.split()[:1] == [component] for line in rest), component
    assert "is linear or has its rule" in done.out
    assert done.err == ""


def test_json_says_what_the_library_says(run: Run, folder: Path, bridge: Any) -> None:
    value = run("check", folder, "--rules", "cplrp", "--json").json
    assert value["status"] == "covered"
    assert (value["weights"], value["rules"], value["dtype"]) == ("checkpoint", "cplrp", "float32")
    assert value["coverage"] == [vars(row) for row in clrp.coverage(bridge, "cplrp").rows]
    report = clrp.audit(bridge)
    assert value["operations"] == sum(report.counts.values())
    assert value["ordinary"] == [{"component": c, "operation": o} for c, o in report.ordinary]
    assert value["findings"] == value["notes"] == []
    assert value["verification"] is None


def test_verify_measures_on_the_prompt(run: Run, folder: Path, bridge: Any) -> None:
    value = run("check", folder, "--verify", "--prompt", "ab a c b d", "--json").json
    expected = clrp.verify(bridge, "ab a c b d")
    found = value["verification"]
    assert (found["verdict"], found["n_tokens"]) == ("ok", expected.n_tokens)
    for check, own in zip(found["checks"], expected.checks, strict=True):
        assert (check["name"], check["verdict"], check["says"]) == (
            own.name,
            own.verdict,
            own.says,
        )
    text = run("check", folder, "--verify")
    assert text.code == 0
    for check in expected.checks:
        assert any(line.split()[:2] == [check.name, check.verdict] for line in text.out.split("\n"))
    assert "Verified on 12 tokens" in text.out


def test_a_failed_check_is_an_exit_code(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ACTIVATIONS, "SiLUActivation", lambda x: 1.1 * torch.sigmoid(x))
    done = run("check", folder, "--verify")
    assert done.code == MODEL
    line = next(line for line in done.out.split("\n") if line.split()[:1] == ["conservation"])
    assert line.split()[1] == "failed"


# ---------------------------------------------------------------- from a config alone


def test_a_config_is_enough(run: Run, config_folder: Path) -> None:
    assert [p.name for p in config_folder.iterdir()] == ["config.json"]
    numbers, dtype = torch.get_rng_state(), torch.get_default_dtype()
    value = run("check", config_folder, "--verify", "--json").json
    assert (value["status"], value["weights"]) == ("covered", "random")
    assert value["class"] == "Qwen3ForCausalLM"
    assert value["verification"]["verdict"] == "ok"
    assert {row["component"] for row in value["coverage"]} >= {"blocks.1.attn.q_norm", "ln_final"}
    assert torch.equal(torch.get_rng_state(), numbers)
    assert torch.get_default_dtype() == dtype
    done = run("check", config_folder)
    assert done.code == 0
    assert "Random weights" in done.err
    assert "Note" not in run("check", config_folder, "--quiet").err


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_random_weights_come_in_any_type(run: Run, config_folder: Path, dtype: str) -> None:
    value = run("check", config_folder, "--dtype", dtype, "--json").json
    assert (value["status"], value["dtype"]) == ("covered", dtype)


def test_config_only_reads_no_weights(run: Run, folder: Path, tmp_path: Path) -> None:
    copied = tmp_path / "broken"
    shutil.copytree(folder, copied)
    (copied / "model.safetensors").write_bytes(b"no weights at all")
    assert run("check", copied, "--json").code == MODEL
    value = run("check", copied, "--config-only", "--json").json
    assert (value["status"], value["weights"]) == ("covered", "random")


def test_what_no_rule_covers_is_said(run: Run, tmp_path: Path) -> None:
    transformers.MambaConfig(
        hidden_size=16, num_hidden_layers=2, vocab_size=40, architectures=["MambaForCausalLM"]
    ).save_pretrained(tmp_path / "mamba")
    done = run("check", tmp_path / "mamba", "--verify")
    assert done.code == MODEL
    assert "not covered" in done.out
    assert "blocks.0.mixer" in done.out
    assert "Verified" not in done.out
    value = run("check", tmp_path / "mamba", "--json")
    assert value.code == MODEL
    assert value.json["status"] == "refused"
    assert "blocks.0.mixer" in value.json["findings"][0]["why"]


def test_findings_of_the_audit_are_listed(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = transformers.models.llama.modeling_llama.LlamaMLP
    honest = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: torch.tanh(honest(self, x)))
    done = run("check", folder)
    assert done.code == MODEL
    line = next(line for line in done.out.split("\n") if "Tanh" in line)
    assert line.split()[:3] == ["blocks.0-1.mlp", "LlamaMLP", "Tanh"]
    found = run("check", folder, "--json").json["findings"]
    assert [f["component"] for f in found] == ["blocks.1.mlp", "blocks.0.mlp"]


def test_a_quantised_checkpoint_is_noted(run: Run, config_folder: Path) -> None:
    file = config_folder / "config.json"
    settings = json.loads(file.read_text("utf-8"))
    settings["quantization_config"] = {"quant_method": "fp8"}
    file.write_text(json.dumps(settings), "utf-8")
    notes = run("check", config_folder, "--json").json["notes"]
    assert any("quantised" in note for note in notes)


# ---------------------------------------------------------------- too big to make


BIG = {
    "deepseek_v3": transformers.DeepseekV3Config(),
    "qwen2_moe": transformers.Qwen2MoeConfig(decoder_sparse_step=3),
    "gemma3": transformers.Gemma3TextConfig(num_hidden_layers=26),
    "qwen3_next": transformers.Qwen3NextConfig(),
    "smollm3": transformers.SmolLM3Config(),
    "jamba": transformers.JambaConfig(),
    "gpt_oss": transformers.GptOssConfig(),
    "llama": transformers.LlamaConfig(),
}


def _kinds(config: Any) -> list[object]:
    """What each layer is made of, read off the model itself."""
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    return [
        (
            tuple((name, type(m).__name__) for name, m in layer.named_modules()),
            getattr(getattr(layer, "self_attn", None), "sliding_window", None) is None,
        )
        for layer in model.layers
    ]


@pytest.mark.parametrize("name", BIG)
def test_enough_layers_for_one_of_each_kind(name: str) -> None:
    config = BIG[name]
    settings = {k: v for k, v in vars(config).items() if not k.startswith("_")}
    kinds = _kinds(config)
    n = random_model.layers_needed(settings, config.num_hidden_layers)
    assert n <= 9
    assert set(kinds[:n]) == set(kinds)


def test_a_big_config_is_reduced_and_says_so(run: Run, tmp_path: Path) -> None:
    big = transformers.Qwen3Config(
        hidden_size=256, intermediate_size=1 << 20, num_hidden_layers=28, vocab_size=151936,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, bos_token_id=151643,
        architectures=["Qwen3ForCausalLM"],
    )  # fmt: skip
    big.save_pretrained(tmp_path / "big")
    value = run("check", tmp_path / "big", "--json").json
    assert value["status"] == "covered"
    layers = {
        row["component"].split(".")[1] for row in value["coverage"] if "." in row["component"]
    }
    assert layers == {"0", "1"}
    assert any("first 2 of 28 layers" in note for note in value["notes"])
    assert any("reduced" in note for note in value["notes"])


def test_what_does_not_fit_is_refused(
    run: Run, config_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("M", (), {"available": 1000})())
    done = run("check", config_folder)
    assert done.code == MODEL
    assert re.search(r"[GM]iB are free", done.err)


# ---------------------------------------------------------------- bad input


def test_bad_input_has_a_clear_error(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x", "utf-8")
    odd = {"no json": "{", "unknown": json.dumps({"model_type": "no_such_thing"})}
    for name, text in odd.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text, "utf-8")
    named = {
        "no such class": ["FooForCausalLM"],
        "no architecture": None,
    }
    for name, architectures in named.items():
        config = make_config("llama")
        config.architectures = architectures
        config.save_pretrained(tmp_path / name)
    for name, words in [
        ("empty", "no config.json"),
        ("file", "is a file"),
        ("not there/at/all", "There is no folder"),
        ("no json", "cannot be loaded"),
        ("unknown", "no_such_thing"),
        ("no such class", "FooForCausalLM"),
        ("no architecture", "architectures"),
    ]:
        done = run("check", tmp_path / name if "/" not in name else name, "--config-only")
        assert done.code == MODEL, name
        assert words in done.err, (name, done.err)
        assert done.out == "", name
        assert "Traceback" not in done.err, name


def test_options_that_make_no_sense(run: Run, folder: Path, config_folder: Path) -> None:
    assert run("check", folder, "--prompt", "a").code == USAGE
    assert run("check", folder, "--verify", "--prompt", "").code == USAGE
    done = run("check", config_folder, "--verify", "--prompt", "a b")
    assert done.code == USAGE
    assert "no tokenizer" in done.err
    assert run("check").code == USAGE
