"""The shipped demo model, its cases, and the generator of its benchmark."""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
import socket
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import torch
from truth.demo_solver import solve

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # demo_training is not part of the wheel

from demo_training import tokenizer as chat  # noqa: E402
from demo_training import words  # noqa: E402
from demo_training.marked import Task, Turn, strip  # noqa: E402
from demo_training.tasks import KINDS, make_task, stream  # noqa: E402
from tl_contrastive_lrp import demo  # noqa: E402

PACKAGE = Path(demo.__file__).parents[1]
CASES = demo.load_demo_cases(failed=None)


@pytest.fixture(scope="module")
def model():
    return demo.load_demo_model()


def _some(per_group: int) -> list[demo.DemoCase]:
    """Cases of every kind, failed and solved, the longest of each group among them."""
    chosen = []
    for kind, failed in itertools.product(demo.KINDS, (True, False)):
        group = sorted(demo.load_demo_cases(kind, failed), key=lambda c: -c.n_tokens)
        chosen += group[:1] + group[1 :: max(1, len(group) // per_group)]
    return chosen


# the package's room ---------------------------------------------------------------------------


def test_enough_cases_of_every_kind_and_small_weights():
    assert demo.KINDS == KINDS
    for kind in demo.KINDS:
        failed, solved = demo.load_demo_cases(kind), demo.load_demo_cases(kind, failed=False)
        assert len(failed) >= 5
        assert len(solved) >= 5
        assert {c.kind for c in failed + solved} == {kind}
    assert len(demo.load_demo_cases()) >= 40
    assert len(demo.load_demo_cases(failed=False)) >= len(demo.load_demo_cases())
    assert len({c.id for c in CASES}) == len({(c.prompt, c.failed) for c in CASES}) == len(CASES)
    assert sum(c.kind == "tool" and c.failed and c.n_tokens >= 900 for c in CASES) >= 3
    assert max(c.n_tokens for c in CASES) >= 1024
    assert (demo.demo_dir() / "model.safetensors").stat().st_size <= 2_000_000
    assert sum(f.stat().st_size for f in demo.demo_dir().iterdir()) <= 3_000_000


def test_unknown_kind_and_odd_failed_say_what_to_type():
    with pytest.raises(ValueError, match=r"'maths'.*'arithmetic'"):
        demo.load_demo_cases("maths")
    with pytest.raises(TypeError, match="True, False, or None"):
        demo.load_demo_cases(failed="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "maths"}, "maths"),
        ({"delta": 0.5}, "above 1"),
        ({"delta": float("nan")}, "above 1"),
        ({"decisive_positions": (10**6,)}, "must lie in"),
        ({"decisive_positions": ()}, "must ascend"),
        ({"decisive_text": ()}, "one text per"),
        ({"target_id": CASES[0].contrast_id}, "same token"),
        ({"failed": not CASES[0].failed}, "contradict"),
    ],
)
def test_a_wrong_case_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CASES[0], **change)


@pytest.mark.slow
def test_loading_is_quiet_offline_and_lazy():
    code = (
        # this room alone, without what the top package imports
        "import sys, types\n"
        "top = sys.modules['tl_contrastive_lrp'] = types.ModuleType('tl_contrastive_lrp')\n"
        f"top.__path__ = [{str(PACKAGE)!r}]\n"
        "import tl_contrastive_lrp.demo as d\n"
        "print(sorted({'torch', 'transformers', 'transformer_lens'} & set(sys.modules)))\n"
        "import torch, transformer_lens.model_bridge\n"
        "def no(*a, **k): raise AssertionError('network')\n"
        "import socket; socket.socket.connect = no; socket.getaddrinfo = no\n"
        "print('<quiet>', file=sys.stderr)\n"
        "m = d.load_demo_model()\n"
        "print('</quiet>', file=sys.stderr)\n"
        "from huggingface_hub import constants\n"
        "print(m.training, m.cfg.dtype, constants.HF_HUB_OFFLINE, len(d.load_demo_cases()) > 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.stdout.split() == ["[]", "False", "torch.float32", "False", "True"]
    assert done.stderr.split("<quiet>\n")[1].split("</quiet>")[0] == ""


def test_missing_weights_are_named(monkeypatch, tmp_path):
    from tl_contrastive_lrp.demo import model as room

    monkeypatch.setattr(room, "files", lambda _: tmp_path)
    with pytest.raises(FileNotFoundError, match="complete wheel"):
        room.load_demo_model()


# the cases against the model and against the benchmark ------------------------------------------


def test_the_model_really_writes_the_target(model):
    for case in _some(4):
        tokens = model.to_tokens(case.prompt)
        assert tokens.tolist()[0] == model.tokenizer(case.prompt)["input_ids"]
        assert tokens.shape == (1, case.n_tokens)
        with torch.no_grad():
            logits = model(tokens)[0, -1]
        assert int(logits.argmax()) == case.target_id, case.id
        delta = float(logits[case.target_id] - logits[case.contrast_id])
        assert delta == pytest.approx(case.delta, abs=1e-2), case.id
        # a solved case's contrast is the best alternative
        if not case.failed:
            assert int(logits.topk(2).indices[1]) == case.contrast_id, case.id


def test_every_case_is_consistent_with_its_tokens(model):
    tokenizer = model.tokenizer
    for case in CASES:
        chatted = tokenizer.apply_chat_template(
            [{"role": "user", "content": case.user}], tokenize=False, add_generation_prompt=True
        )
        assert (
            case.prompt
            == chatted + case.answer_prefix
            == chat.chat_prompt(case.user) + case.answer_prefix
        )
        coded = tokenizer(case.prompt, return_offsets_mapping=True)
        assert len(coded["input_ids"]) == case.n_tokens
        covered = [case.prompt[slice(*coded["offset_mapping"][p])] for p in case.decisive_positions]
        assert covered == list(case.decisive_text), case.id
        for name in ("target", "contrast"):
            token = getattr(case, name)
            assert tokenizer(token)["input_ids"] == [getattr(case, f"{name}_id")]
            if case.failed:
                assert token.strip()
                assert not token.startswith("<|")


def test_every_case_agrees_with_the_solver():
    for case in CASES:
        assert solve(case.kind, case.user) == case.answer, case.id
        assert (case.model_answer == case.answer) is not case.failed
        right = case.contrast if case.failed else case.target
        assert case.answer.startswith(case.answer_prefix + right), case.id
        assert case.model_answer.startswith(case.answer_prefix + case.target), case.id


def test_cases_are_held_out():
    """Each case's text falls into the held-out part, whose tasks training never draws."""
    for case in CASES:
        key = case.user
        if case.kind == "tool":
            key = case.user.split("\n", 1)[1].rsplit("\n", 1)[0]  # the log without the question
        assert Task(case.kind, "", (Turn(case.user, ()),), split_key=key).held_out, case.id


# the generator ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_generator_is_deterministic_and_right(kind):
    knobs = {"max_length": 300, "held_out": False}
    one = list(itertools.islice(stream(kind, 11, **knobs), 200))
    assert one == list(itertools.islice(stream(kind, 11, **knobs), 200))
    assert one != list(itertools.islice(stream(kind, 12, **knobs), 200))
    for task in one:
        assert not task.held_out
        assert solve(kind, strip(task.turns[0].user)[0]) == task.turns[0].answer_text


def test_unknown_kind_is_refused_by_the_generator():
    with pytest.raises(ValueError, match=r"unknown kind 'maths'.*tool"):
        make_task("maths", random.Random(0))


def test_tool_questions_about_one_log_all_get_right_answers():
    for task in itertools.islice(stream("tool", 3, max_length=300, turns=6), 50):
        log = strip(task.turns[0].user)[0].rsplit("\n", 1)[0]
        for turn in task.turns[1:]:
            assert solve("tool", f"{log}\n{turn.user and strip(turn.user)[0]}") == turn.answer_text


_ALTERNATIVES = [
    tuple(str(i) for i in range(1, 100)), words.NAMES, words.NOUNS,
    tuple(w.upper() for w in words.NOUNS), words.CLOSERS, words.BULLETS, words.JOINERS,
    words.COUNTS[2:], words.VARIABLES, words.FIELDS, tuple(words.TOOLS), ("upper", "lower"),
    ("newest", "oldest"), ("first", "last"), ("second", "first"), ("third", "first"),
    ("plus", "minus", "times"),
    ("buys", "sells"), ("finds", "loses"), ("gets", "drops"), ("wins", "gives away"),
]  # fmt: skip


def _alternative(text: str, rng: random.Random, taken: str) -> str | None:
    """Another word of the same sort that does not stand in the question yet, where there is one."""
    for sort in _ALTERNATIVES:
        if text in sort:
            others = [w for w in sort if w != text]
            free = [w for w in others if not re.search(rf"(?<!\w){re.escape(w)}(?!\w)", taken)]
            return rng.choice(free or others)
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_decisive_words_decide_and_other_numbers_do_not(kind):
    """Changing one marked word changes the solver's answer; other numbers do not matter."""
    rng = random.Random(kind)
    changed = kept = 0
    for task in itertools.islice(stream(kind, 21, max_length=200), 120):
        turn = task.turns[0]
        user, spans = strip(turn.user)
        by = {name for s in turn.answer for name in s.by} | set(turn.end_by)
        for name, a, b in spans:
            other = _alternative(user[a:b], rng, user)
            if name in by and other is not None:
                edited = user[:a] + other + user[b:]
                assert solve(kind, edited) != turn.answer_text, (name, user, edited)
                changed += 1
        for hit in re.finditer(r"\d+", user):
            if not any(a < hit.end() and hit.start() < b for n, a, b in spans if n in by):
                edited = user[: hit.start()] + str(rng.randint(10, 99)) + user[hit.end() :]
                assert solve(kind, edited) == turn.answer_text, (user, edited)
                kept += 1
    assert changed > 200
    assert kept > 30 or kind == "format"


def test_vocabulary_is_plain():
    for group in (words.NAMES, words.NOUNS, words.VARIABLES, words.FIELDS, words.CLOSERS):
        assert len(set(group)) == len(group)
        assert all(unicodedata.normalize("NFKC", w) == w and w.isalpha() for w in group)


def test_no_socket_is_needed(monkeypatch):
    def no(*_: object) -> None:
        raise AssertionError("network")

    monkeypatch.setattr(socket.socket, "connect", no)
    assert demo.load_demo_model().cfg.n_ctx >= 1024
