"""Models by name, their fingerprints, and tokenizers that must be the same."""

from __future__ import annotations

import copy

import pytest
import torch

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.errors import TokenizerMismatchError
from tl_contrastive_lrp.study import models
from tl_contrastive_lrp.study.models import ModelSpec, check_same_tokens, fingerprint, open_model


@pytest.fixture(scope="module")
def model():
    return clrp.load_demo_model(device="cpu")


def test_a_fingerprint_is_that_of_the_numbers(model):
    own = fingerprint(model)
    assert own == fingerprint(open_model(ModelSpec("d", "demo"), device="cpu"))
    assert own == fingerprint(open_model(ModelSpec("e", str(clrp.demo.demo_dir())), device="cpu"))
    assert own != fingerprint(open_model(ModelSpec("d", "demo", dtype="bfloat16"), device="cpu"))
    changed = clrp.load_demo_model(device="cpu")
    for parameter in (list(changed.original_model.parameters())[i] for i in (0, 7, -1)):
        with torch.no_grad():
            value = parameter.view(-1)[-1].clone()
            parameter.view(-1)[-1] = torch.nextafter(value, torch.tensor(torch.inf))
            assert fingerprint(changed) != own
            parameter.view(-1)[-1] = value
    assert fingerprint(changed) == own
    changed.original_model.config.rope_parameters["rope_theta"] = 12.0
    assert fingerprint(changed) != own


def test_a_fingerprint_is_also_that_of_what_decides_prompts_and_ends(model):
    own, changed = fingerprint(model), clrp.load_demo_model(device="cpu")
    tokenizer = changed.tokenizer
    tokenizer(["a", "a longer text"], padding=True, truncation=True, max_length=8)
    assert fingerprint(changed) == own  # what a call leaves behind is no part of the model
    template = tokenizer.chat_template
    tokenizer.chat_template = template.replace("<|im_end|>", "<|im_end|> ", 1)
    assert fingerprint(changed) != own
    tokenizer.chat_template = template
    tokenizer.add_special_tokens({"additional_special_tokens": ["desk"]})
    assert fingerprint(changed) != own
    changed = clrp.load_demo_model(device="cpu")
    changed.original_model.generation_config.eos_token_id = [2, 5]
    assert fingerprint(changed) != own
    changed = clrp.load_demo_model(device="cpu")
    inner = changed.original_model.model
    inner.register_buffer("correction", torch.zeros(2))  # such as the bias of a router
    hashes = {own, fingerprint(changed)}
    inner.correction += 1
    assert len(hashes | {fingerprint(changed)}) == 3
    inner.register_buffer("correction", torch.zeros(2), persistent=False)  # computed, not loaded
    assert fingerprint(changed) == own


def test_the_family_lies_beside_the_package_or_above_the_current_folder(
    model, tmp_path, monkeypatch
):
    installed = tmp_path / "elsewhere" / "tl_contrastive_lrp" / "study" / "models.py"
    monkeypatch.setattr(models, "__file__", str(installed))
    (tmp_path / "tutorials").mkdir()
    monkeypatch.chdir(tmp_path / "tutorials")
    with pytest.raises(FileNotFoundError, match=r"Only the model 'demo' is part of the installed"):
        open_model(ModelSpec("s", "demo/small"))
    assert models.family_steps() is None
    for name, steps in (("small", 5000), ("small-0250", 250)):
        folder = tmp_path / "demo_family" / name
        folder.mkdir(parents=True)
        for file in ("config.json", "model.safetensors"):
            (folder / file).write_bytes((clrp.demo.demo_dir() / file).read_bytes())
        text = (folder / "config.json").read_text()
        (folder / "config.json").write_text(text.replace("{", f'{{"trained_steps": {steps},', 1))
    (tmp_path / "demo_family" / "small-notes").mkdir()
    assert models.family_steps() == (250, 5000)  # above the current folder
    monkeypatch.setattr(models, "__file__", str(tmp_path / "tl_contrastive_lrp/study/models.py"))
    monkeypatch.chdir("/")
    assert models.family_steps() == (250, 5000)  # beside the package
    for name in ("demo/small", "demo/small@250", "demo/small@5000"):
        opened = open_model(ModelSpec("s", name), device="cpu")
        assert opened.cfg.model_name == name
        check_same_tokens(model, opened)
    with pytest.raises(FileNotFoundError, match=r"no demo/small@300. It has demo, demo/small, dem"):
        open_model(ModelSpec("s", "demo/small@300"))
    with pytest.raises(FileNotFoundError, match="no demo/large"):
        open_model(ModelSpec("s", "demo/large"))


@pytest.mark.parametrize(
    "wrong",
    [{"name": ""}, {"model": ""}, {"dtype": "int8"}, {"revision": "main"}, {"device_map": "auto"}],
)
def test_names_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match=r"needs a name|use one of float32|neither revision"):
        ModelSpec(**{"name": "d", "model": "demo/small", **wrong})


def test_device_and_device_map_exclude_each_other():
    spec = ModelSpec("d", str(clrp.demo.demo_dir()), device_map="auto")
    with pytest.raises(ValueError, match="leave the device out"):
        open_model(spec, device="cpu")


def test_other_tokens_are_named(model):
    other = clrp.load_demo_model(device="cpu")
    check_same_tokens(model, other)
    own = other.tokenizer
    other.tokenizer = copy.deepcopy(own)
    other.tokenizer.add_tokens(["<new>"])
    with pytest.raises(TokenizerMismatchError, match="id 1194 is missing in the first and '<new>'"):
        check_same_tokens(model, other)
    other.tokenizer = copy.deepcopy(own)
    other.tokenizer.eos_token = "<|endoftext|>"
    with pytest.raises(TokenizerMismatchError, match="only one of them treats"):
        check_same_tokens(model, other)
    other.tokenizer = None
    with pytest.raises(TokenizerMismatchError, match="has no tokenizer"):
        check_same_tokens(model, other)
