"""Adapters and GGUF files become one plain model; quantised models and autocast are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import peft
import pytest
import torch
import transformers
from huggingface_hub import errors as hub_errors
from support.cli_runs import MODEL, PROMPT, TEXT, USAGE, Run, typed_next, words
from support.hooking import delta, fresh
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from truth.families import SPACE, make_tokenizer, random_tokens

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.cli import model as cli_model
from tl_contrastive_lrp.cli.errors import message_of
from tl_contrastive_lrp.errors import ModelStateError, UncoveredComponentError

SIDES = ("--prompt", PROMPT, "--target", " a", "--contrast", " b")


def lora(**changes: Any) -> peft.LoraConfig:
    settings: dict[str, Any] = {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
        "init_lora_weights": False,  # random: an adapter that does nothing proves nothing
    }
    return peft.LoraConfig(**{**settings, **changes})


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="session")
def adapter(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("adapter") / "mine"
    peft.get_peft_model(load(folder), lora()).save_pretrained(path)
    return path


def by_hand(folder: Path, adapter: Path) -> Any:
    """The base model with W + (alpha/r) · B A in each weight, without peft."""
    from safetensors.torch import load_file

    model, found = load(folder), load_file(adapter / "adapter_model.safetensors")
    names = {key.rsplit(".lora_", 1)[0] for key in found}
    assert len(names) == 8
    for name in names:
        module = model.get_submodule(name.removeprefix("base_model.model."))
        a, b = found[f"{name}.lora_A.weight"], found[f"{name}.lora_B.weight"]
        module.weight.data += 2.0 * b @ a
    return model.eval()


def truth(model: Any, folder: Path) -> tuple[float, list[float]]:
    """Δℓ of the model's own forward, and relevance of the bridge around it."""
    bridge = TransformerBridge.boot_transformers(str(folder), hf_model=model, device="cpu")
    ids = bridge.to_tokens(PROMPT)
    target, contrast = (bridge.to_single_token(t) for t in (" a", " b"))
    with torch.no_grad():
        row = model(ids).logits[0, -1]
    result = clrp.attribute(bridge, ids, target=" a", contrast=" b")
    return float(row[target] - row[contrast]), result.tokens.tolist()


# ---- adapters ----------------------------------------------------------------------------


@pytest.mark.parametrize("with_base", [False, True])
def test_an_adapter_is_merged_and_that_is_said(
    run: Run, folder: Path, adapter: Path, with_base: bool
) -> None:
    expected, tokens = truth(by_hand(folder, adapter), folder)
    plain, _ = truth(load(folder).eval(), folder)
    assert abs(expected - plain) > 0.1
    base = ("--model", folder) if with_base else ()
    reply = run("explain", *base, "--adapter", adapter, *SIDES, "--json").json
    assert reply["delta"] == pytest.approx(expected, abs=1e-4)
    assert [row["relevance"] for row in reply["tokens"]] == pytest.approx(tokens, abs=1e-4)
    assert reply["model"] == f"{folder} + {adapter}"
    assert any("(LORA) is merged into the weights" in note for note in reply["notes"])
    done = run("graph", *base, "--adapter", adapter, *SIDES, "--json")
    assert done.json["delta"] == pytest.approx(expected, abs=1e-4)
    done = run("check", folder, "--adapter", adapter, "--verify", "--json")
    assert done.json["status"] == "covered"
    line = typed_next(run("explain", *base, "--adapter", adapter, "--prompt", PROMPT))
    assert f"--adapter {adapter}" in line


def test_an_adapter_for_another_model_is_noted_or_refused(
    run: Run, folder: Path, adapter: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    done = run("explain", "--model", other, "--adapter", adapter, *SIDES)
    assert done.code == 0
    assert f"was made for {folder}, and --model is {other}" in words(done.err)
    lacking = tmp_path / "lacking"
    shutil.copytree(adapter, lacking)
    from safetensors.torch import load_file, save_file

    found = load_file(adapter / "adapter_model.safetensors")
    found.pop(sorted(found)[0])
    save_file(found, lacking / "adapter_model.safetensors")
    done = run("explain", "--adapter", lacking, *SIDES)
    assert (done.code, done.out) == (MODEL, "")
    assert "does not fit" in done.err


def test_adapters_that_cannot_be_merged(run: Run, folder: Path, tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft.get_peft_model(load(folder), config).save_pretrained(tmp_path / "soft")
    done = run("explain", "--adapter", tmp_path / "soft", *SIDES)
    assert (done.code, done.out) == (MODEL, "")
    assert "cannot be merged into the weights: it adds virtual tokens" in done.err


def test_what_to_type_for_an_adapter(
    run: Run, folder: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def error_of(*arguments: object, code: int = MODEL) -> str:
        done = run("explain", *arguments, *SIDES)
        assert (done.code, done.out) == (code, ""), done
        assert "Traceback" not in done.err
        return words(done.err.replace("│", " "))

    assert f"holds an adapter, not a whole model. Type --adapter {adapter}" in error_of(
        "--model", adapter
    )
    assert f"It holds a whole model: --model {folder}" in error_of("--adapter", folder)
    done = run("check", adapter)  # and what it says can be typed
    assert f"Type --adapter {adapter}, and leave the model out" in done.err
    done = run("check", "--adapter", adapter, "--json")
    assert (done.code, done.json["status"]) == (0, "covered")
    assert done.json["model"].endswith(f"+ {adapter}")
    done = run("check", "--adapter", folder)
    assert f"It holds a whole model: tl-contrastive-lrp check {folder}" in done.err
    done = run("check")
    assert (done.code, "Missing argument 'MODEL'" in done.err) == (USAGE, True)
    assert "There is no folder nowhere" in error_of("--adapter", "nowhere")
    assert "Missing option '--model'" in error_of(code=USAGE)
    lost, nameless = tmp_path / "lost", tmp_path / "nameless"
    for path, base in ((lost, "/nowhere/base"), (nameless, None)):
        shutil.copytree(adapter, path)
        settings = json.loads((path / "adapter_config.json").read_text())
        settings["base_model_name_or_path"] = base
        (path / "adapter_config.json").write_text(json.dumps(settings))
    message = error_of("--adapter", lost)
    assert "There is no folder /nowhere/base" in message
    assert "--model gives another" in message
    assert "names no base model. Give it with --model" in error_of("--adapter", nameless)
    find = cli_model.find_spec
    monkeypatch.setattr(cli_model, "find_spec", lambda name: None if name == "peft" else find(name))
    assert 'pip install "tl_contrastive_lrp[adapters]"' in error_of("--adapter", adapter)


@pytest.mark.parametrize(
    "config",
    [lora(), lora(use_dora=True), lora(lora_dropout=0.3, bias="lora_only"), peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM", init_ia3_weights=False,
    )],
    ids=["lora", "dora", "dropout and biases", "ia3"],
)  # fmt: skip
def test_adapters_that_are_not_merged_are_linear(folder: Path, config: Any) -> None:
    """Inside a bridge their layers are part of the model: relevance is that of the merged one."""
    torch.manual_seed(5)
    inside = load(folder)
    adapted = peft.get_peft_model(inside, config).eval()
    for name, parameter in inside.named_parameters():
        if "ia3_l" in name:
            parameter.data = 1 + 0.5 * torch.randn(parameter.shape)
    found, tokens = truth(inside, folder)
    graph = clrp.attribution_graph(
        TransformerBridge.boot_transformers(str(folder), hf_model=inside, device="cpu"),
        PROMPT, target=" a", contrast=" b",
    )  # fmt: skip
    expected, merged = truth(adapted.merge_and_unload().eval(), folder)
    assert found == pytest.approx(expected, abs=1e-4)
    assert tokens == pytest.approx(merged, abs=1e-4)
    assert graph.relevance[0].sum().item() == pytest.approx(sum(merged), abs=1e-3)
    plain, _ = truth(load(folder).eval(), folder)
    assert abs(expected - plain) > 1e-2


def test_a_peft_model_is_told_what_to_type(folder: Path) -> None:
    adapted = peft.get_peft_model(load(folder), lora()).eval()
    ids = random_tokens()
    for call in (
        lambda: clrp.attribute(adapted, ids, delta),
        lambda: clrp.attribution_graph(adapted, ids, delta),
        lambda: clrp.run_with_relevance(adapted, ids, delta),
        lambda: clrp.next_token_table(adapted, ids),
        lambda: clrp.logit_diff(adapted, " a", " b"),
        lambda: clrp.lrp_hooks(adapted),
        lambda: clrp.coverage(adapted),
        lambda: clrp.verify(adapted, ids),
    ):
        with pytest.raises(TypeError, match=r"hf_model=model\.merge_and_unload\(\)"):
            call()


# ---- GGUF --------------------------------------------------------------------------------


def _permuted(weight: Tensor, heads: int) -> Tensor:
    """Rows as llama.cpp orders them: each head's halves interleaved."""
    rows = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, rows, -1).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A tiny Llama in a GGUF file, matrices in eight bits; and the model of these very numbers."""
    torch.manual_seed(11)
    tokenizer = make_tokenizer()
    size = len(tokenizer)
    config = transformers.LlamaConfig(
        vocab_size=size, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        rms_norm_eps=1e-3, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape) + (parameter.ndim == 1)
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-3)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(list(range(size))))
    writer.add_token_types([3 if i < 4 else 1 for i in range(size)])
    merged = [token for token in tokenizer.get_vocab() if len(token) == 2 and token[0] == SPACE]
    writer.add_token_merges([f"{SPACE} {token[1]}" for token in sorted(merged)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm", "model.embed_tokens": "token_embd",
        "model.norm": "output_norm", "lm_head": "output",
    }  # fmt: skip
    q8 = gguf.GGMLQuantizationType.Q8_0
    for name, parameter in model.named_parameters():
        inner = name.removesuffix(".weight")
        block = ""
        if inner.startswith("model.layers."):
            _, _, layer, inner = inner.split(".", 3)
            block = f"blk.{layer}."
        weight, heads = parameter.data, {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(inner)
        if heads:
            weight = _permuted(weight, heads)
        key = f"{block}{names[inner]}.weight"
        if weight.ndim == 1:
            writer.add_tensor(key, weight.numpy())
            continue
        packed = gguf.quants.quantize(weight.numpy().astype(np.float32), q8)
        writer.add_tensor(key, packed, raw_dtype=q8)
        numbers = torch.from_numpy(gguf.quants.dequantize(packed, q8).copy())
        if heads:  # back again
            half = numbers.shape[0] // heads // 2
            numbers = numbers.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(numbers.shape)
        assert 0 < (numbers - parameter.data).abs().max() < 0.05
        parameter.data = numbers
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, model


def test_a_gguf_file_is_dequantised_and_that_is_said(
    run: Run, gguf_file: tuple[Path, Any], tmp_path: Path
) -> None:
    path, model = gguf_file
    done = run("explain", "--model", path, "--prompt", "a b c", "--target", "id:33", "--contrast",
               "id:32", "--json")  # fmt: skip
    assert done.code == 0, done
    reply = done.json
    assert "The weights of tiny.gguf were dequantised to float32." in reply["notes"]
    ids = torch.tensor([[row["id"] for row in reply["tokens"]]])
    with torch.no_grad():
        row = model(ids).logits[0, -1]
    assert reply["delta"] == pytest.approx(float(row[33] - row[32]), abs=1e-4)
    model.save_pretrained(tmp_path / "same")
    make_tokenizer().save_pretrained(tmp_path / "same")
    bridge = TransformerBridge.boot_transformers(str(tmp_path / "same"), device="cpu")
    expected = clrp.attribute(bridge, ids, target=33, contrast=32).tokens.tolist()
    assert [r["relevance"] for r in reply["tokens"]] == pytest.approx(expected, abs=1e-4)
    low = run("explain", "--model", path, "--prompt", "a b c", "--contrast", "id:32", "--dtype",
              "bfloat16", "--json").json  # fmt: skip
    assert "The weights of tiny.gguf were dequantised to bfloat16." in low["notes"]
    assert low["dtype"] == "bfloat16"
    assert run("check", path, "--json").json["status"] == "covered"
    done = run("explain", "--model", path, "--prompt", "a b c")
    assert done.code == TEXT
    assert "dequantised to float32" in done.err


def test_gguf_files_that_cannot_be_read(
    run: Run, gguf_file: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, other = tmp_path / "broken.gguf", tmp_path / "model.bin"
    broken.write_bytes(b"GGUF, but not really")
    other.write_bytes(b"x")
    done = run("explain", "--model", broken, *SIDES)
    assert (done.code, done.out) == (MODEL, "")
    assert "broken.gguf cannot be loaded" in done.err
    assert "Traceback" not in done.err
    for missing in ("missing.gguf", tmp_path / "missing.gguf"):
        for command in (("explain", "--model", missing, *SIDES), ("check", missing)):
            done = run(*command)
            assert done.code == MODEL
            assert f"There is no file {missing}." in done.err
    assert "is a file. Give the folder" in run("explain", "--model", other, *SIDES).err
    assert "is a file" in run("check", gguf_file[0], "--config-only").err
    find = cli_model.find_spec
    monkeypatch.setattr(cli_model, "find_spec", lambda name: None if name == "gguf" else find(name))
    done = run("explain", "--model", gguf_file[0], *SIDES)
    assert done.code == MODEL
    assert 'pip install "tl_contrastive_lrp[gguf]"' in done.err


# ---- models that cannot be loaded --------------------------------------------------------


def _raised_from(cause: Exception) -> OSError:
    """As transformers wraps errors of the hub."""
    try:
        raise OSError("some words of transformers") from cause
    except OSError as error:
        return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (_raised_from(hub_errors.LocalEntryNotFoundError("x")), "the Hugging Face hub does not"),
        (hub_errors.OfflineModeIsEnabled("x"), "the Hugging Face hub does not answer"),
        (
            _raised_from(hub_errors.GatedRepoError.__new__(hub_errors.GatedRepoError)),
            "is a gated model",
        ),
        (torch.OutOfMemoryError("full"), "does not fit into memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "does not fit into memory"),
        (OSError("some words"), "cannot be loaded: some words (OSError). Check the name"),
    ],
)
def test_the_reason_is_recognised_by_class(error: Exception, message: str) -> None:
    assert message in cli_model.why_not_loaded("an/organisation-model", error)


# ---- quantised models --------------------------------------------------------------------


def _class(name: str, base: type, module: str) -> Any:
    return type(name, (base,), {"__module__": module})


def _subclass(name: str, module: str) -> Callable[[nn.Linear], None]:
    def change(linear: nn.Linear) -> None:
        kind = _class(name, Tensor, module)
        data = linear.weight.data.as_subclass(kind)
        linear.weight = nn.Parameter(data, requires_grad=False)

    return change


def _module(name: str, module: str) -> Callable[[nn.Linear], None]:
    def change(linear: nn.Linear) -> None:
        linear.__class__ = _class(name, nn.Linear, module)

    return change


def _packed(linear: nn.Linear) -> None:
    linear.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))


def _config(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(linear.weight.data.to(torch.int8), requires_grad=False)


@pytest.mark.parametrize(
    ("change", "library"),
    [
        (_subclass("Int8Tensor", "torchao.quantization"), "torchao"),
        (_subclass("AffineQuantizedTensor", "torchao.dtypes.affine_quantized_tensor"), "torchao"),
        (_subclass("WeightQBytesTensor", "optimum.quanto.tensor.weights.qbytes"), "quanto"),
        (_module("QLinear", "optimum.quanto.nn.qlinear"), "quanto"),
        (_module("Linear4bit", "bitsandbytes.nn.modules"), "bitsandbytes"),
        (_module("Linear8bitLt", "bitsandbytes.nn.modules"), "bitsandbytes"),
        (_module("HQQLinear", "hqq.core.quantize"), "HQQ"),
        (_module("TritonV2QuantLinear", "gptqmodel.nn_modules.qlinear.tritonv2"), "GPTQ"),
        (_module("WQLinear_GEMM", "awq.modules.linear.gemm"), "AWQ"),
        (_module("CompressedLinear", "compressed_tensors.linear.compressed_linear"),
         "compressed-tensors"),
        (_module("FP8Linear", "transformers.integrations.finegrained_fp8"), "fp8"),
        (_config, "some-method"),
        (_packed, "some-method"),
    ],
)  # fmt: skip
def test_a_quantised_model_names_the_library(
    change: Callable[[nn.Linear], None], library: str
) -> None:
    model = fresh("qwen3")
    linear = model.blocks[1].mlp.out.original_component
    change(linear)
    model.original_model.config.quantization_config = type(
        "Q", (), {"quant_method": "some-method"}
    )()
    ids = random_tokens()
    for call in (
        lambda: clrp.attribute(model, ids[:1], delta),
        lambda: clrp.attribution_graph(model, ids[:1], delta),
        lambda: clrp.run_with_relevance(model, ids, delta),
        lambda: clrp.coverage(model),
        lambda: clrp.lrp_hooks(model),
    ):
        with pytest.raises(UncoveredComponentError) as info:
            call()
        message = str(info.value)
        assert f"The model is quantised by {library}: model.layers.1.mlp.down_proj" in message
        assert "Load the model unquantised" in message
        typed = message_of(info.value)  # on the command line nobody types Python
        assert "Give the unquantised model." in typed
        assert ("TransformerBridge" in typed) == (library == "bitsandbytes")
        assert ("dequantize(dtype=torch.float32)" in message) == (library == "bitsandbytes")


def test_a_model_that_was_dequantised_is_no_quantised_one() -> None:
    model = fresh("qwen3")
    model.original_model.config.quantization_config = {"quant_method": "fp8"}
    try:
        clrp.attribute(model, random_tokens()[:1], delta)
    finally:
        del model.original_model.config.quantization_config


def test_a_quantised_folder_that_does_not_load(run: Run, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "quantised"
    shutil.copytree(folder, path)
    settings = json.loads((path / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (path / "config.json").write_text(json.dumps(settings))
    done = run("explain", "--model", path, *SIDES)
    assert (done.code, done.out) == (MODEL, "")
    assert "is a checkpoint quantised by gptq" in done.err
    assert "give the unquantised model" in done.err


# ---- autocast ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_named(dtype: torch.dtype) -> None:
    model, ids = fresh("llama"), random_tokens()

    def context() -> None:
        with clrp.lrp(model):
            pass

    calls: tuple[Callable[[], object], ...] = (
        context,
        lambda: clrp.lrp_hooks(model),
        lambda: clrp.run_with_relevance(model, ids, delta),
        lambda: clrp.attribute(model, ids[:1], delta),
        lambda: clrp.attribute(model, ids[:1], delta, memory="tiled", tile=3),
        lambda: clrp.attribution_graph(model, ids[:1], delta),
        lambda: clrp.verify(model, ids[:1]),
    )
    before = clrp.attribute(model, ids[:1], delta)
    with torch.autocast("cpu", dtype=dtype):
        for call in calls:
            with pytest.raises(ModelStateError, match=r"inside torch\.autocast\('cpu'\)"):
                call()
        with torch.autocast("cpu", enabled=False):
            inside = clrp.attribute(model, ids[:1], delta)
    assert torch.equal(inside.tokens, before.tokens)
    assert model.list_hooks() == {}


# ---- pages -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["r.png", "r.pdf", "r.SVG", "r.json", "r.safetensors", "a.b.txt"])
def test_a_page_is_no_picture(run: Run, folder: Path, bridge: Any, name: str) -> None:
    result = clrp.attribute(bridge, PROMPT, target=" a", contrast=" b")
    graph = clrp.attribution_graph(bridge, PROMPT, target=" a", contrast=" b")
    right = str(Path(name).with_suffix(".html"))
    for page in (result, graph):
        with pytest.raises(ValueError, match=right):
            page.save_html(name)
    for command in ("explain", "graph"):
        done = run(command, "--model", folder, *SIDES, "--out", name)
        assert (done.code, done.out) == (USAGE, "")
        assert f"--out {name} would be no" in done.err
        assert right in done.err
    assert run("demo", "--out", name).code == USAGE
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("name", ["r.html", "R.HTM", "r", "Qwen3-0.6B", ".hidden"])
def test_names_that_pages_may_have(bridge: Any, tmp_path: Path, name: str) -> None:
    result = clrp.attribute(bridge, PROMPT, target=" a", contrast=" b")
    assert result.save_html(tmp_path / name).read_text().startswith("<!")
