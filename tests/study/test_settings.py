"""A study's file: read exactly, or refused with the path of what is wrong and what to write."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from tl_contrastive_lrp.errors import SettingsError
from tl_contrastive_lrp.study.settings import (
    AnalyseSection,
    ModelSettings,
    load_settings,
    read_settings,
    template,
    write_template,
)

SMALL: dict[str, Any] = {
    "version": 1,
    "base": {"model": "demo"},
    "benchmarks": [{"name": "demo"}],
}


def read(**changes: Any) -> Any:
    return read_settings(yaml.safe_dump({**SMALL, **changes}))


def test_a_small_file_has_defaults() -> None:
    settings = read()
    assert settings.base == ModelSettings("demo")
    assert settings.base.name == "demo"
    assert settings.analyse == AnalyseSection()
    assert (settings.analyse.check, settings.analyse.check_tokens) == (False, 16)
    assert settings.collect.given() == {"batch_size": 8, "thinking": False}
    assert settings.models == (settings.base,)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.seed = 3


def test_every_value_arrives() -> None:
    settings = read(
        siblings=[{"name": "b", "model": "org/b", "revision": "main", "dtype": "bfloat16"}],
        checkpoints=[{"model": "org/a", "revision": "step10", "step": 10}],
        benchmarks=[
            {
                "name": "gsm8k",
                "path": "x.jsonl",
                "limit": 3,
                "options": {"split": "t"},
                "collect": {"top_k": 4, "thinking": False},
            },
            {"name": "math"},
        ],
        collect={
            "locators": ["given"],
            "min_delta": 2,
            "thinking": None,
            "top_k": 5,
            "writer_dtype": "bfloat16",
        },
        analyse={"rules": ["gim", "relp"], "graph": "not clear", "mass": 1, "flip_limit": 0,
                 "check": "first", "check_tokens": 8},
    )  # fmt: skip
    assert settings.siblings[0].dtype == "bfloat16"
    assert settings.checkpoints[0].name == "org/a@step10"
    assert settings.benchmarks[0].options == {"split": "t"}
    assert settings.collect.given() == {
        "batch_size": 8, "thinking": None, "locators": ("given",), "min_delta": 2.0, "top_k": 5,
    }  # fmt: skip
    assert settings.collect.writer_dtype == "bfloat16"
    own, other = (one.collecting(settings.collect) for one in settings.benchmarks)
    assert own.given() == {**settings.collect.given(), "top_k": 4, "thinking": False}
    assert own.writer_dtype == "bfloat16"
    assert other == settings.collect
    assert settings.analyse.rules == ("gim", "relp")
    assert (settings.analyse.graph, settings.analyse.mass) == ("not clear", 1.0)
    assert (settings.analyse.check, settings.analyse.check_tokens) == ("first", 8)


@pytest.mark.parametrize(
    ("changes", "where", "says"),
    [
        ({"colect": {}}, "colect", "did you mean collect?"),
        ({"zzz": 1}, "zzz", "use one of version"),
        ({"collect": {"max_new_token": 3}}, "collect.max_new_token", "did you mean max_new_tokens"),
        ({"collect": {"max_new_tokens": 0}}, "collect.max_new_tokens", "give 1 or more"),
        ({"collect": {"max_new_tokens": "64"}}, "collect.max_new_tokens", "give a whole number"),
        ({"collect": {"max_new_tokens": 6.5}}, "collect.max_new_tokens", "give a whole number"),
        ({"collect": {"max_new_tokens": True}}, "collect.max_new_tokens", "give a whole number"),
        ({"collect": {"min_delta": float("nan")}}, "collect.min_delta", "nan; give a finite"),
        ({"collect": {"min_delta": float("inf")}}, "collect.min_delta", "inf; give a finite"),
        ({"collect": {"min_delta": 10**400}}, "collect.min_delta", "give a finite number"),
        ({"collect": {"max_new_tokens": float("inf")}}, "collect.max_new_tokens", "give a finite"),
        ({"analyse": {"node_threshold": float("inf")}}, "analyse.node_threshold", "give a finite"),
        ({"seed": float("-inf")}, "seed", "it is -inf; give a finite number"),
        (
            {"benchmarks": [{"name": "a", "collect": {"min_delta": float("inf")}}]},
            "benchmarks[0].collect.min_delta",
            "give a finite number",
        ),
        (
            {"benchmarks": [{"name": "a", "options": {"x": [1, {"y": float("nan")}]}}]},
            "benchmarks[0].options.x[1].y",
            "it is nan; give a finite number",
        ),
        ({"collect": {"locators": "given"}}, "collect.locators", "give a list"),
        ({"collect": {"locators": ["given", 3]}}, "collect.locators", "give a list"),
        ({"collect": {"thinking": "no thanks"}}, "collect.thinking", "true or false"),
        ({"collect": None}, "collect", "it is empty; give a mapping of max_new_tokens"),
        ({"collect": {"writer_dtype": "int8"}}, "collect.writer_dtype", "give 'float32' or"),
        (
            {"benchmarks": [{"name": "a", "collect": {"topk": 3}}]},
            "benchmarks[0].collect.topk",
            "did you mean top_k",
        ),
        (
            {"benchmarks": [{"name": "a", "collect": {"top_k": 1}}]},
            "benchmarks[0].collect.top_k",
            "give 2 or more",
        ),
        (
            {"benchmarks": [{"name": "a", "collect": {"writer_dtype": "float16"}}]},
            "benchmarks[0].collect.writer_dtype",
            "one writer completes all benchmarks",
        ),
        ({"analyse": {"rules": ["attnlpr"]}}, "analyse.rules", "did you mean attnlrp?"),
        ({"analyse": {"rules": []}}, "analyse.rules", "it is empty"),
        ({"analyse": {"rules": ["gim", "gim"]}}, "analyse.rules", "there twice"),
        ({"analyse": {"mass": 0}}, "analyse.mass", "above 0"),
        ({"analyse": {"mass": 1.5}}, "analyse.mass", "up to 1"),
        ({"analyse": {"graph": "sometimes"}}, "analyse.graph", "true or false or 'not clear'"),
        ({"analyse": {"granularity": "head"}}, "analyse.granularity", "'block' or 'sublayer'"),
        ({"analyse": {"check": "all"}}, "analyse.check", "true or false or 'first'"),
        ({"analyse": {"check": 1}}, "analyse.check", "true or false or 'first'"),
        ({"analyse": {"check_tokens": 0}}, "analyse.check_tokens", "give 1 or more"),
        ({"analyse": {"check_token": 8}}, "analyse.check_token", "did you mean check_tokens?"),
        ({"base": {"model": 7}}, "base.model", "give a text"),
        ({"base": {"name": "x"}}, "base.model", "it is missing"),
        ({"base": {"model": ""}}, "base.model", "it is empty"),
        ({"base": {"model": "demo", "step": 3}}, "base.step", "only checkpoints"),
        ({"base": "demo"}, "base", "it is the text 'demo'; give a mapping of model"),
        ({"siblings": [{"model": "x", "dtype": "int8"}]}, "siblings[0].dtype", "'bfloat16'"),
        ({"siblings": [{"model": "x"}, {"modell": "y"}]}, "siblings[1].modell", "mean model?"),
        ({"siblings": [{"model": "demo"}]}, "models", "'demo' is there twice"),
        ({"siblings": {"model": "x"}}, "siblings", "give a list"),
        ({"checkpoints": [{"model": "x"}]}, "checkpoints[0].step", "it is missing"),
        ({"checkpoints": [{"model": "x", "step": -1}]}, "checkpoints[0].step", "0 or more"),
        ({"benchmarks": []}, "benchmarks", "it is empty"),
        ({"benchmarks": [{"name": "a/b"}]}, "benchmarks[0].name", "without /"),
        ({"benchmarks": [{"name": "a"}, {"name": "a"}]}, "benchmarks", "'a' is there twice"),
        ({"benchmarks": [{"name": "a", "limit": 0}]}, "benchmarks[0].limit", "1 or more"),
        ({"version": 2}, "version", "this package reads 1"),
        ({"version": "1"}, "version", "give a whole number"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], where: str, says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read(**changes)
    assert str(caught.value).startswith(f"{where}: ")
    assert says in str(caught.value)


def test_what_is_no_mapping_is_refused() -> None:
    for text, says in (
        ("", "it is empty"),
        ("[1]", "mapping"),
        ("a: [", "YAML"),
        ("version: 1\nversion: 1", "line 2: the key 'version' is there twice"),
        ("base: {model: demo}\nbenchmarks: [{name: demo}]", "version: it is missing"),
        ("!!python/object/apply:os.getcwd []", "YAML"),
    ):
        with pytest.raises(SettingsError, match=None) as caught:
            read_settings(text)
        assert says in str(caught.value)


def test_a_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    with pytest.raises(FileNotFoundError, match="clrp study init"):
        load_settings(path)
    path.write_text("version: 1\nbase: {model: demo}\nbenchmarks: [{name: demo, limitt: 3}]")
    with pytest.raises(SettingsError) as caught:
        load_settings(path)
    assert str(caught.value) == (
        f"{path}: benchmarks[0].limitt: 'limitt' is no key; did you mean limit?"
    )
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match="UTF-8"):
        load_settings(path)


def test_the_written_file_is_a_study_with_and_without_the_family(tmp_path: Path) -> None:
    path = write_template(tmp_path / "study.yaml", family=[100, 200])
    settings = load_settings(path)
    assert (settings.analyse.check, settings.analyse.check_tokens) == (False, 16)
    assert settings.base.model == "demo/small"
    assert [model.model for model in settings.checkpoints] == ["demo/small@100", "demo/small@200"]
    assert [model.step for model in settings.checkpoints] == [100, 200]
    siblings = {model.name: model.model for model in settings.siblings}
    assert siblings == {"demo": "demo", "demo large": "demo/large"}
    with pytest.raises(FileExistsError, match="another file"):
        write_template(path, family=None)
    alone = read_settings(template("s.yaml", family=None))
    assert alone.models == (ModelSettings("demo"),)
    assert "clrp study run s.yaml" in template("s.yaml", family=None)
    # The lines that are commented out are right once their marks are taken away.
    again = "\n".join(
        line[2:] if line.startswith(("# siblings", "#   -", "# checkpoints")) else line
        for line in template("s.yaml", family=None).split("\n")
    )
    assert [model.step for model in read_settings(again).models] == [None, None, 1000]
    with pytest.raises(FileNotFoundError):
        write_template(tmp_path / "none" / "s.yaml", family=None)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_numbers_in_python_are_finite_too(value: float) -> None:
    with pytest.raises(SettingsError, match=r"node_threshold: it is (inf|nan); give a finite"):
        AnalyseSection(node_threshold=value)
