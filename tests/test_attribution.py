"""attribute(): fields, the account of Δℓ, files, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from families import ALL, FAMILIES, boot, random_tokens, saved, true_float64
from safetensors import safe_open
from safetensors.torch import save_file

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.errors import FileFormatError, PromptError, TokenError

RULES = tuple(clrp.RULE_SETS)
TEXT = "a b c d e f"


@pytest.fixture(scope="module")
def result() -> clrp.Attribution:
    model = boot("gemma2", torch.float32)
    return clrp.attribute(model, TEXT, target="a", contrast=" b", neurons=True)


# ---------------------------------------------------------------- fields


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("name", FAMILIES)
def test_fields_equal_run_with_relevance(name: str, rules: str) -> None:
    model, ids = boot(name, torch.float32), random_tokens()
    objective = clrp.logit_diff(model, 7, 11)
    result = clrp.attribute(model, ids, objective, rules=rules, neurons=True)
    logits, r = clrp.run_with_relevance(model, ids, objective, rules=rules)
    n = model.cfg.n_layers
    assert result.sites == (
        *(f"blocks.{i}.hook_resid_pre" for i in range(n)), f"blocks.{n - 1}.hook_resid_post"
    )  # fmt: skip
    assert result.resid.shape == (n + 1, 9)
    assert result.heads.shape == (n, model.cfg.n_heads, 9)
    assert result.neurons is not None
    assert result.neurons.shape == (n, 9, 40)
    largest = float(r["hook_embed"].sum(-1).abs().max())
    pairs = [(result.tokens, r["hook_embed"][0].sum(-1))]
    pairs += [
        (row, r[site][0].sum(-1)) for row, site in zip(result.resid, result.sites, strict=True)
    ]
    for i in range(n):
        pairs.append((result.heads[i], r[f"blocks.{i}.attn.hook_z"][0].sum(-1).T))
        pairs.append((result.neurons[i], r[f"blocks.{i}.mlp.hook_post"][0]))
    for got, wanted in pairs:
        assert got.device.type == "cpu"
        assert float((got - wanted).abs().max()) < 2e-6 * max(largest, 1.0)
    assert result.token_ids.tolist() == ids[0].tolist()
    target, contrast = float(logits[0, -1, 7]), float(logits[0, -1, 11])
    assert math.isclose(result.target_logit, target, rel_tol=1e-6)
    assert math.isclose(result.contrast_logit or 0.0, contrast, rel_tol=1e-6)
    assert math.isclose(result.delta, target - contrast, rel_tol=1e-4, abs_tol=1e-6)
    assert result.rules == result.coverage.rules == rules
    assert clrp.attribute(model, ids, objective, rules=rules).neurons is None


def test_texts(result: clrp.Attribution) -> None:
    assert (result.target, result.contrast) == ("a", " b")
    assert "logit('a') − logit(' b')" in result.objective
    assert "".join(result.str_tokens) == "<bos>" + TEXT
    assert repr(result).startswith("Attribution(")
    assert f"{result.delta:+.4f}" in repr(result)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.delta = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("form", ["objective", "ids", "strings", "sets", "1-d ids"])
def test_ways_to_ask(form: str) -> None:
    model = boot("qwen3", torch.float32)
    ids = model.to_tokens(TEXT)
    wanted = clrp.attribute(model, TEXT, clrp.logit_diff(model, 5, 32))
    calls: dict[str, Any] = {
        "objective": lambda: clrp.attribute(model, ids, clrp.logit_diff(model, "a", " b")),
        "ids": lambda: clrp.attribute(model, ids, target=5, contrast=32),
        "strings": lambda: clrp.attribute(model, TEXT, target="a", contrast=" b"),
        "sets": lambda: clrp.attribute(model, TEXT, target={5}, contrast=["b", " b"][1:]),
        "1-d ids": lambda: clrp.attribute(model, ids[0], target=5, contrast=32, pos=5),
    }
    got = calls[form]()
    assert torch.equal(got.tokens, wanted.tokens)
    assert got.delta == wanted.delta


def test_token_id_zero_is_a_token() -> None:
    model = boot("qwen3", torch.float32)
    got = clrp.attribute(model, TEXT, target=0, contrast=5)
    assert got.target == "<pad>"


def test_a_function_of_ones_own() -> None:
    model = boot("qwen3", torch.float32)

    def my_metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[0, -1, 7] - logits[0, -1, 11]

    got = clrp.attribute(model, random_tokens(), my_metric)
    wanted = clrp.attribute(model, random_tokens(), target=7, contrast=11)
    torch.testing.assert_close(got.tokens, wanted.tokens, rtol=1e-5, atol=1e-6)
    assert got.objective == "my_metric"
    assert got.contrast_logit is None
    assert (got.target, got.contrast) == ("", "")


@pytest.mark.parametrize("make", ["target", "top", "top_k", "mean"])
def test_other_objectives(make: str, tmp_path: Path) -> None:
    model = boot("gpt2", torch.float32)
    objective = {
        "target": clrp.target_logit(model, 7),
        "top": clrp.top_logit(),
        "top_k": clrp.logit_minus_top_k(model, 7, 3),
        "mean": clrp.logit_minus_mean(model, 7),
    }[make]
    result = clrp.attribute(model, random_tokens(), objective)
    with torch.no_grad():
        assert math.isclose(result.delta, float(objective(model(random_tokens()))), rel_tol=1e-5)
    contrast = result.contrast_logit
    assert (contrast is None) == (make in ("target", "top"))
    assert math.isclose(result.target_logit - (contrast or 0.0), result.delta, rel_tol=1e-5)
    loaded = clrp.Attribution.load(result.save(tmp_path / "r.safetensors"))
    assert loaded.contrast_logit == contrast


def test_an_earlier_position_is_not_reached_by_later_tokens() -> None:
    model = boot("qwen3", torch.float32)
    result = clrp.attribute(model, random_tokens(), target=7, contrast=11, pos=4)
    assert result.tokens[5:].count_nonzero() == 0
    assert result.resid[:, 5:].count_nonzero() == 0
    assert result.tokens[:5].count_nonzero() == 5


def test_greyed_tokens() -> None:
    model = boot("qwen3", torch.float32)
    ids = torch.tensor([[6, 1, 7, 2, 9]])  # neither <bos> nor <eos> is first
    result = clrp.attribute(model, ids, target=7, contrast=11)
    assert result.special.tolist() == [False, True, False, True, False]
    assert result.greyed.tolist() == [True, True, False, True, False]
    assert result.special.tolist() == [False, True, False, True, False]  # not written through
    assert result.str_tokens[1] == "<bos>"


def test_frames(result: clrp.Attribution) -> None:
    frame = result.to_frame()
    assert list(frame.columns) == ["pos", "token", "id", "relevance", "share", "special"]
    assert frame["token"].tolist() == list(result.str_tokens)
    assert torch.allclose(torch.tensor(frame["relevance"].to_numpy()), result.tokens)
    assert math.isclose(frame["share"].sum(), result.ledger.share_to_tokens, rel_tol=1e-5)
    top = result.top(3)
    order = result.tokens.abs().argsort(descending=True)[:3].tolist()
    assert top["pos"].tolist() == order
    assert top.index.tolist() == [0, 1, 2]
    assert len(result.top(1000)) == len(result.str_tokens)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rules", ["attnlrp", "cplrp"])
def test_precisions(dtype: torch.dtype, rules: str, tmp_path: Path) -> None:
    model = boot("gemma2", dtype)
    result = clrp.attribute(
        model, random_tokens(), target=7, contrast=11, rules=rules, neurons=True
    )
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert {t.dtype for t in (result.tokens, result.resid, result.heads)} == {wanted}
    assert result.neurons is not None
    assert result.neurons.isfinite().all()
    loaded = clrp.Attribution.load(result.save(tmp_path / "r"))
    assert torch.equal(loaded.resid, result.resid)


# ---------------------------------------------------------------- the ledger


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("name", ALL)
def test_the_ledger_balances(name: str, rules: str) -> None:
    model = boot(name, torch.float32)
    result = clrp.attribute(model, random_tokens(), target=7, contrast=11, rules=rules)
    ledger = result.ledger
    n = model.cfg.n_layers
    assert [row.site for row in ledger.rows] == ["hook_embed", *result.sites]
    assert ledger.delta == result.delta
    above = [*(row.total for row in ledger.rows[1:]), ledger.delta]
    scale = max(abs(row.total) for row in ledger.rows) + abs(ledger.delta)
    for row, up in zip(ledger.rows, above, strict=True):
        assert abs(row.total + row.biases + row.positions + row.other - up) < 1e-6 * scale
        assert all(math.isfinite(v) for v in (row.total, row.biases, row.positions, row.other))
    totals = [result.tokens, *result.resid]
    for row, tensor in zip(ledger.rows, totals, strict=True):
        assert math.isclose(row.total, float(tensor.double().sum()), rel_tol=1e-5, abs_tol=1e-6)
    assert all(row.positions == 0.0 for row in ledger.rows[1:])
    assert (ledger.rows[0].positions != 0.0) == name.startswith("gpt2")
    if name in ("qwen3", "llama", "mistral", "gemma2", "gemma3"):
        assert all(row.biases == 0.0 for row in ledger.rows)
    else:
        biased = name.startswith(("gpt2", "qwen2")) or name.endswith("bias")
        assert any(row.biases != 0.0 for row in ledger.rows) == biased
    assert len(ledger.rows) == n + 2
    assert math.isclose(ledger.share_to_tokens, ledger.rows[0].total / ledger.delta, rel_tol=1e-9)
    assert len(ledger.to_frame()) == n + 2
    assert "Δℓ" in str(ledger)


@pytest.mark.parametrize("objective", ["diff", "top_k", "mean", "target"])
@pytest.mark.parametrize("name", ALL)
def test_nothing_is_lost_under_cplrp(name: str, objective: str) -> None:
    """Every rule of CP-LRP conserves: all of Δℓ is at the input, in biases or in positions."""
    model = boot(name)
    chosen = {
        "diff": clrp.logit_diff(model, {7, 9}, 11),
        "top_k": clrp.logit_minus_top_k(model, 7, 3, pos=6),
        "mean": clrp.logit_minus_mean(model, 7),
        "target": clrp.target_logit(model, 7),
    }[objective]
    with true_float64(model):
        result = clrp.attribute(model, random_tokens(), chosen, rules="cplrp")
    scale = max(1.0, abs(result.delta))
    for row in result.ledger.rows:
        assert abs(row.other) < 1e-9 * scale, row
    parts = sum(row.biases + row.positions for row in result.ledger.rows)
    assert math.isclose(result.ledger.rows[0].total + parts, result.delta, rel_tol=1e-8)


@pytest.mark.parametrize("folded", [False, True], ids=["no processing", "folded"])
@pytest.mark.parametrize(
    "name", [*FAMILIES, "qwen3-bias", "llama-bias", "gpt2-gelu", "gpt2-untied", "qwen2-tied"]
)
def test_nothing_is_lost_in_compatibility_mode(name: str, folded: bool) -> None:
    """The biases that folding moves are still accounted for."""
    from transformer_lens.model_bridge import TransformerBridge

    model = TransformerBridge.boot_transformers(str(saved(name)), device="cpu", dtype=torch.float64)
    plain = clrp.attribute(model, random_tokens(), target=7, contrast=11, rules="cplrp")
    model.enable_compatibility_mode(disable_warnings=True, no_processing=not folded)
    result = clrp.attribute(model, random_tokens(), target=7, contrast=11, rules="cplrp")
    assert math.isclose(result.delta, plain.delta, rel_tol=1e-5, abs_tol=1e-5)
    for row in result.ledger.rows:
        assert abs(row.other) < 1e-5 * max(1.0, abs(result.delta)), row


def test_heads_under_cplrp_hold_what_attention_writes() -> None:
    """Σ heads = relevance of the output projection's output, where it has no bias."""
    model, ids = boot("qwen3", torch.float64), random_tokens()
    objective = clrp.logit_diff(model, 7, 11)
    result = clrp.attribute(model, ids, objective)
    _, r = clrp.run_with_relevance(model, ids, objective)
    for i in range(2):
        wanted = r[f"blocks.{i}.hook_attn_out"][0].sum(-1)
        torch.testing.assert_close(result.heads[i].sum(0), wanted, rtol=1e-6, atol=1e-9)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"target": 7},
        {"contrast": 7},
        {"objective": True, "target": 7},
        {"objective": True, "contrast": 7},
        {"objective": True, "target": 7, "contrast": 11},
    ],
    ids=str,
)
def test_half_an_objective_is_refused(given: dict[str, Any]) -> None:
    model = boot("qwen3", torch.float32)
    if "objective" in given:
        given = {**given, "objective": clrp.logit_diff(model, 7, 11)}
    with pytest.raises(TypeError, match="next_token_table"):
        clrp.attribute(model, TEXT, **given)


def test_a_position_beside_an_objective_is_refused() -> None:
    """The objective has its own position; this one would go unheard."""
    model = boot("qwen3", torch.float32)
    with pytest.raises(TypeError, match="pos"):
        clrp.attribute(model, TEXT, clrp.logit_diff(model, 7, 11), pos=2)


def test_a_batch_is_refused() -> None:
    model = boot("qwen3", torch.float32)
    with pytest.raises(PromptError, match="batch of 2"):
        clrp.attribute(model, random_tokens(2), target=7, contrast=11)
    with pytest.raises(PromptError, match="batch of 2"):
        clrp.attribute(model, ["a b", "c d"], target=7, contrast=11)  # type: ignore[arg-type]


def test_tokens_and_positions_are_checked() -> None:
    model = boot("qwen3", torch.float32)
    with pytest.raises(TokenError, match="2 tokens"):
        clrp.attribute(model, TEXT, target="ab", contrast="a")
    with pytest.raises(TokenError, match="Position 6"):
        clrp.attribute(model, TEXT, target="a", contrast="b", pos=6)


@pytest.mark.parametrize("name", ["tokens", "resid", "heads", "token_ids", "special", "neurons"])
def test_shapes_are_checked(result: clrp.Attribution, name: str) -> None:
    whole = getattr(result, name)
    short = whole[:, :-1] if name == "neurons" else whole[..., :-1]
    with pytest.raises(ValueError, match=name):
        dataclasses.replace(result, **{name: short})


# ---------------------------------------------------------------- files


def _same(a: clrp.Attribution, b: clrp.Attribution) -> None:
    for field in dataclasses.fields(a):
        one, two = getattr(a, field.name), getattr(b, field.name)
        if isinstance(one, torch.Tensor):
            assert one.dtype == two.dtype, field.name
            assert torch.equal(one, two), field.name
        else:
            assert one == two, field.name
            assert type(one) is type(two), field.name


@pytest.mark.parametrize("neurons", [True, False])
@pytest.mark.parametrize("name", ["qwen3", "gpt2", "gemma2"])
def test_saved_and_loaded_is_the_same(name: str, neurons: bool, tmp_path: Path) -> None:
    model = boot(name, torch.float32)
    result = clrp.attribute(model, TEXT, target="a", contrast={6, 7}, neurons=neurons)
    path = result.save(tmp_path / "result.safetensors")
    assert path == tmp_path / "result.safetensors"
    loaded = clrp.Attribution.load(path)
    _same(result, loaded)
    assert str(loaded.coverage) == str(result.coverage)
    _same(result, clrp.Attribution.load(str(path)))


def test_odd_text_survives(result: clrp.Attribution, tmp_path: Path) -> None:
    words = ("\x00", "<script>", "é", "\u2028", "\U0001f600", "{}", "")
    odd = dataclasses.replace(result, str_tokens=words, target="{}", delta=float("nan"))
    loaded = clrp.Attribution.load(odd.save(tmp_path / "odd"))
    assert loaded.str_tokens == words
    assert math.isnan(loaded.delta)


def test_saving_again_replaces_the_file(result: clrp.Attribution, tmp_path: Path) -> None:
    path = result.save(tmp_path / "r")
    dataclasses.replace(result, model_name="other").save(path)
    assert clrp.Attribution.load(path).model_name == "other"
    assert [p.name for p in tmp_path.iterdir()] == ["r"]


def _rewritten(source: Path, target: Path, change: Any) -> Path:
    with safe_open(source, framework="pt") as file:
        meta = dict(file.metadata())
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    change(meta, tensors)
    save_file(tensors, target, metadata=meta)
    return target


def _data(edit: Any) -> Any:
    def change(meta: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:  # noqa: ARG001
        data = json.loads(meta["data"])
        edit(data)
        meta["data"] = json.dumps(data)

    return change


DAMAGE: dict[str, tuple[Any, str]] = {
    "newer": (lambda m, t: m.update(version="2"), "version 2"),  # noqa: ARG005
    "no version": (lambda m, t: m.pop("version"), "version"),  # noqa: ARG005
    "another format": (lambda m, t: m.update(format="x"), "no attribution"),  # noqa: ARG005
    "no data": (lambda m, t: m.pop("data"), "damaged"),  # noqa: ARG005
    "data is no JSON": (lambda m, t: m.update(data="{"), "damaged"),  # noqa: ARG005
    "data is a list": (lambda m, t: m.update(data="[]"), "damaged"),  # noqa: ARG005
    "no tokens": (lambda m, t: t.pop("tokens"), "damaged"),  # noqa: ARG005
    "no heads": (lambda m, t: t.pop("heads"), "damaged"),  # noqa: ARG005
    "no special": (lambda m, t: t.pop("special"), "damaged"),  # noqa: ARG005
    "short tokens": (lambda m, t: t.update(tokens=t["tokens"][:-1].clone()), "tokens"),  # noqa: ARG005
    "tokens of one dimension too many": (
        lambda m, t: t.update(tokens=t["tokens"][None].clone()),  # noqa: ARG005
        "tokens",
    ),
    "heads of one dimension": (lambda m, t: t.update(heads=t["tokens"].clone()), "heads"),  # noqa: ARG005
    "an unknown field": (_data(lambda d: d.update(colour="red")), "damaged"),
    "a missing field": (_data(lambda d: d.pop("delta")), "damaged"),
    "no ledger": (_data(lambda d: d.pop("ledger")), "damaged"),
    "a ledger row cut short": (_data(lambda d: d["ledger"]["rows"][0].pop("site")), "damaged"),
    "coverage is text": (_data(lambda d: d.update(coverage="all")), "damaged"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_and_foreign_files(result: clrp.Attribution, kind: str, tmp_path: Path) -> None:
    change, said = DAMAGE[kind]
    path = _rewritten(result.save(tmp_path / "good"), tmp_path / "bad", change)
    with pytest.raises(FileFormatError, match=said) as info:
        clrp.Attribution.load(path)
    assert str(path) in str(info.value)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_truncated_files(result: clrp.Attribution, share: float, tmp_path: Path) -> None:
    whole = result.save(tmp_path / "good").read_bytes()
    path = tmp_path / "cut"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(FileFormatError, match="cut"):
        clrp.Attribution.load(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff" * 100, pickle.dumps({"a": 1})], ids=str)
def test_foreign_bytes(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "foreign"
    path.write_bytes(content)
    with pytest.raises(FileFormatError):
        clrp.Attribution.load(path)


def test_other_safetensors_files(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "weights")
    with pytest.raises(FileFormatError, match="no attribution"):
        clrp.Attribution.load(tmp_path / "weights")


def test_no_file(tmp_path: Path, result: clrp.Attribution) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(FileNotFoundError, match=str(path)):
            clrp.Attribution.load(path)
    with pytest.raises(OSError, match="nowhere"):
        result.save(tmp_path / "nowhere" / "r")
