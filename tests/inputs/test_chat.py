"""``chat``: the ids are the template's, and each message is exactly where the template put it.

The truth is Hugging Face's rendering of the same chat with a word of its own in place of each
message's text: the text between these words is the template's, and ``TEXT_OF`` says what a family
does to a message. The templates have the published structure of the families.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import pickle
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from truth import chat_tokenizers as forms
from truth.chat_templates import SYSTEM_LAST, TEMPLATES, TEXT_OF, WITH_TOOLS

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.errors import PromptError

FAMILIES = list(TEMPLATES)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town.",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
    },
}


@functools.cache
def model_of(family: str) -> Any:
    template, form = TEMPLATES[family]
    model = forms.booted(form)
    model.tokenizer.chat_template = template
    return model


def hf(family: str, messages: Any, **settings: Any) -> str:
    settings = {"add_generation_prompt": True, **settings}
    tokenizer = model_of(family).tokenizer
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **settings))


def hf_ids(family: str, messages: Any, **settings: Any) -> list[int]:
    settings = {"add_generation_prompt": True, **settings}
    coded = model_of(family).tokenizer.apply_chat_template(messages, tokenize=True, **settings)
    return list(coded["input_ids"])


def tool_call(name: str, arguments: Any, family: str) -> dict[str, Any]:
    if family == "deepseek" and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    function = {"name": name, "arguments": arguments}
    return {"type": "function", "id": "a1b2c3d4e", "function": function}


def is_division(prompt: clrp.ChatPrompt) -> None:
    """The segments cover tokens and text, in order, without a gap or overlap."""
    assert "".join(s.text for s in prompt.segments) == str(prompt)
    ends = [0]
    for segment in prompt.segments:
        assert segment.start == ends[-1] <= segment.stop
        ends.append(segment.stop)
    assert ends[-1] == len(prompt.tokens) == len(prompt.str_tokens)


def is_by_token(prompt: clrp.ChatPrompt) -> None:
    """Slowly: each token lies in the segment of its first character that is not white space."""
    text, at, begins = str(prompt), 0, []
    if "".join(prompt.str_tokens) != text:
        return
    for token in prompt.str_tokens:
        solid = token.strip()
        begins.append(begins[-1] if not token and begins else at)
        if solid:
            begins[-1] = at + token.index(solid[0])
        at += len(token)
    edges = [*itertools.accumulate((len(s.text) for s in prompt.segments), initial=0)]
    for which, segment in enumerate(prompt.segments):
        last = which == len(prompt.segments) - 1
        for pos in range(segment.start, segment.stop):
            low, high = edges[which], edges[which + 1]
            assert low <= begins[pos] < high or (last and begins[pos] == high), (pos, segment)


EDGE = st.sampled_from(["", "", " ", "\n", "  ", "\n\n ", "\t"])
INSIDE = st.lists(
    st.sampled_from([*"abcXYZ019 .,!?'\"{}&é🎉\n", "<b>", "</b>", "天", "\\", "ß", "Ω", "\u200d"]),
    max_size=25,
).map("".join)
TEXT = st.builds(lambda a, b, c: a + "x" + b.strip() + c, EDGE, INSIDE, EDGE) | st.builds(
    lambda a, b, c: a + b.strip() + "7" + c, EDGE, INSIDE, EDGE
)


@st.composite
def chats(draw: Any) -> list[dict[str, Any]]:
    messages = [{"role": "system", "content": draw(TEXT)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 3))):
        messages.append({"role": "user", "content": draw(TEXT)})
        messages.append({"role": "assistant", "content": draw(TEXT)})
    return [*messages, {"role": "user", "content": draw(TEXT)}]


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=40)
@given(messages=chats())
def test_random_chats(family: str, messages: list[dict[str, Any]]) -> None:
    prompt = clrp.chat(model_of(family), messages)
    assert prompt.tokens.tolist() == hf_ids(family, messages)
    assert str(prompt) == hf(family, messages)
    is_division(prompt)
    is_by_token(prompt)
    words = [f"W{k}ZQ" for k in range(len(messages))]
    named = hf(family, [{**m, "content": w} for m, w in zip(messages, words, strict=True)])
    pieces = re.split(r"(W\d+ZQ)", named)
    truth = []
    for piece in pieces:
        if piece in words:
            message = messages[words.index(piece)]
            text = TEXT_OF[family](message["role"], message["content"])
            truth.append((message["role"], text))
        elif piece:
            truth.append(("template", piece))
    assert [(s.kind, s.text) for s in prompt.segments] == truth
    names = [s.name for s in prompt.segments]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("family", WITH_TOOLS)
@pytest.mark.parametrize(
    "arguments", [{"town": 'Zürich "old"'}, {"n": 3}, {"a": {"b": [1, True]}}, {}]
)
def test_tools(family: str, arguments: dict[str, Any]) -> None:
    messages = [
        {"role": "user", "content": "What is the weather?"},
        {"role": "assistant", "tool_calls": [tool_call("weather", arguments, family)]},
        {"role": "tool", "content": 'Rain.\n"Wet"', "tool_call_id": "a1b2c3d4e", "name": "weather"},
    ]
    if family == "mistral":
        messages.append({"role": "assistant", "content": "Umbrella"})
        messages.append({"role": "user", "content": "Really?"})
    tools = None if family == "deepseek" else [WEATHER]  # that template ignores them
    prompt = clrp.chat(model_of(family), messages, tools=tools)
    assert str(prompt) == hf(family, messages, tools=tools)
    assert prompt.tokens.tolist() == hf_ids(family, messages, tools=tools)
    is_division(prompt)
    is_by_token(prompt)
    [call] = [s for s in prompt.segments if s.kind == "tool call"]
    [result] = [s for s in prompt.segments if s.kind == "tool result"]
    [user] = [s for s in prompt.segments if s.kind == "user"][:1]
    assert user.text == "What is the weather?"
    assert call.name == "tool call 1: weather"
    assert call.role == "assistant"
    assert result.text == TEXT_OF[family]("tool result", 'Rain.\n"Wet"')
    if family == "deepseek":
        written = messages[1]["tool_calls"][0]["function"]["arguments"]
        assert call.text == f"weather\n```json\n{written}"
    else:
        key = "parameters" if family == "llama3" else "arguments"
        read = json.loads(call.text)
        assert (read["name"], read[key]) == ("weather", arguments)


def test_several_tool_calls_beside_text() -> None:
    calls = [tool_call("weather", {"town": town}, "qwen3") for town in ("Rome", "Rome", "Bern")]
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "I look.", "tool_calls": calls},
        *({"role": "tool", "content": text} for text in ("sun", "sun", "rain")),
    ]
    prompt = clrp.chat(model_of("qwen3"), messages)
    is_division(prompt)
    spans = [(s.name, s.text) for s in prompt.segments if s.kind != "template"]
    call = '{"name": "weather", "arguments": {"town": "%s"}}'
    assert spans == [
        ("user 1", "Weather?"),
        ("assistant 1", "I look."),
        ("tool call 1: weather", call % "Rome"),
        ("tool call 2: weather", call % "Rome"),
        ("tool call 3: weather", call % "Bern"),
        ("tool result 1", "sun"),
        ("tool result 2", "sun"),
        ("tool result 3", "rain"),
    ]


ASKED = {"role": "user", "content": "2 + 2?"}


def kinds(prompt: clrp.ChatPrompt) -> list[tuple[str, str]]:
    is_division(prompt)
    return [(s.kind, s.text) for s in prompt.segments if s.kind != "template"]


def test_thinking_is_told_from_the_answer() -> None:
    model = model_of("qwen3")
    said = {"role": "assistant", "content": "<think>\nTwo and two.\n</think>\n\nFour."}
    written = kinds(clrp.chat(model, [ASKED, said]))  # continued, as it is the last message
    assert written[1:] == [("thinking", "Two and two."), ("assistant", "Four.")]
    apart = {"role": "assistant", "content": "Four.", "reasoning_content": "Two and two."}
    assert kinds(clrp.chat(model, [ASKED, apart])) == written
    # The template leaves out the thoughts of earlier turns.
    later = [("user", "2 + 2?"), ("assistant", "Four."), ("user", "2 + 2?")]
    assert kinds(clrp.chat(model, [ASKED, said, ASKED])) == later
    assert kinds(clrp.chat(model, [ASKED, apart, ASKED])) == later


def test_thinking_off_and_on() -> None:
    model = model_of("qwen3")
    for choice in (None, True, False):
        given = {} if choice is None else {"enable_thinking": choice}
        prompt = clrp.chat(model, [ASKED], enable_thinking=choice)
        assert prompt.tokens.tolist() == hf_ids("qwen3", [ASKED], **given)
        assert str(prompt).endswith("</think>\n\n") is (choice is False)
    with pytest.raises(PromptError, match="same with and without enable_thinking"):
        clrp.chat(model_of("llama3"), [ASKED], enable_thinking=False)


def test_an_answer_so_far() -> None:
    answer = "<think>\nTwo.\n</think>\nFour"
    prompt = clrp.chat(model_of("qwen3"), [ASKED], answer=answer)
    ids = hf_ids("qwen3", [ASKED])
    assert prompt.tokens[: len(ids)].tolist() == ids
    own = model_of("qwen3").tokenizer(answer, add_special_tokens=False)["input_ids"]
    assert prompt.tokens[len(ids) :].tolist() == own
    assert kinds(prompt)[1:] == [("thinking", "<think>\nTwo.\n</think>"), ("assistant", "\nFour")]
    assert prompt.segments[-1].name == "answer"
    # DeepSeek's template opens the thought itself.
    prompt = clrp.chat(model_of("deepseek"), [ASKED], answer="Two.\n</think>Four")
    assert kinds(prompt)[1:] == [("thinking", "Two.\n</think>"), ("assistant", "Four")]
    prompt = clrp.chat(model_of("deepseek"), [ASKED], answer="Two.")
    assert kinds(prompt)[1:] == [("thinking", "Two.")]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_follows_each_template(family: str) -> None:
    prompt = clrp.chat(model_of(family), [ASKED], answer="The capital")
    ids = hf_ids(family, [ASKED])
    assert prompt.tokens[: len(ids)].tolist() == ids
    assert str(prompt) == hf(family, [ASKED]) + "The capital"
    is_division(prompt)
    assert prompt.segments[-1].text == "The capital"
    assert "".join(prompt.str_tokens[prompt.segments[-1].start :]).strip() == "The capital"


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "mistral"])
def test_a_last_message_of_the_assistant_is_continued(family: str) -> None:
    messages = [ASKED, {"role": "assistant", "content": "The capital"}]
    prompt = clrp.chat(model_of(family), messages)
    given = {"add_generation_prompt": False, "continue_final_message": True}
    assert prompt.tokens.tolist() == hf_ids(family, messages, **given)
    assert str(prompt).endswith("The capital")
    assert kinds(prompt)[-1] == ("assistant", "The capital")
    with pytest.raises(PromptError, match="answer"):
        clrp.chat(model_of(family), messages, answer="x")


def test_mistral_puts_the_system_message_last() -> None:
    assert SYSTEM_LAST == ("mistral",)
    system = {"role": "system", "content": "Brief."}
    chat = [system, ASKED, {"role": "assistant", "content": "Four."}, {**ASKED, "content": "Sure?"}]
    spans = kinds(clrp.chat(model_of("mistral"), chat))
    assert [text for _, text in spans] == ["2 + 2?", "Four.", "Brief.", "Sure?"]
    with pytest.raises(PromptError, match="leaves out the system of message 1"):
        clrp.chat(model_of("mistral"), chat[:3])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("content", ['"', "{}", "<b>", "'\\'", "&"])
def test_texts_of_signs_alone(family: str, content: str) -> None:
    prompt = clrp.chat(model_of(family), [{"role": "user", "content": content}])
    is_division(prompt)
    assert [s.text for s in prompt.segments if s.kind == "user"] == [content]


def test_empty_messages_have_no_segment() -> None:
    for content in ("", "  \n"):
        messages = [ASKED, {"role": "assistant", "content": content}, ASKED]
        assert [kind for kind, _ in kinds(clrp.chat(model_of("phi3"), messages))] == ["user"] * 2


def test_lists_of_texts_are_messages_too() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert kinds(clrp.chat(model_of("gemma3"), [{"role": "user", "content": parts}])) == [
        ("user", "one"),
        ("user", "two"),
    ]
    image = [{"type": "image", "url": "x"}]
    with pytest.raises(PromptError, match="other than text"):
        clrp.chat(model_of("gemma3"), [{"role": "user", "content": image}])


LOOP = "{%% for m in messages %%}%s{%% endfor %%}"
REFUSED = {
    "upper": (LOOP % "{{ m.content | upper }}", "rewrites the messages' letters"),
    "reversed": (LOOP % "{{ m.content | reverse }}", "cuts or rewrites"),
    "cut": (LOOP % "{{ m.content[:4] }}", "cuts or rewrites"),
    "hole": (LOOP % "{{ m.content[:3] + m.content[5:] }}", "cuts or rewrites"),
    "twice": (LOOP % "{{ m.content }}{{ m.content }}", "repeats"),
    "dropped": ("hello", "leaves out the user"),
    "looks": (
        LOOP % "{% if 'abc' in m.content %}A{% else %}B{% endif %}{{ m.content }}",
        "rewrites",
    ),
    "fails": ("{{ raise_exception('No!') }}", "refuses: No!"),
    "mixed": (
        "{% for a, b in [(messages[0].content, messages[1].content)] %}"
        "{{ a[:3] + b + a[3:] }}{% endfor %}",
        "cuts or rewrites",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_templates_that_change_messages_are_refused(name: str) -> None:
    model = forms.booted("qwen")
    model.tokenizer.chat_template, message = REFUSED[name]
    chat = [{"role": "user", "content": "abcdefgh"}, {"role": "user", "content": "second"}]
    with pytest.raises(PromptError, match=re.escape(message)):
        clrp.chat(model, chat)


def test_wrong_input_is_named() -> None:
    model = model_of("qwen3")
    for wrong in ("hello", {"role": "user"}, 3):
        with pytest.raises(TypeError, match="give a list of dicts"):
            clrp.chat(model, wrong)  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="no messages"):
        clrp.chat(model, [])
    with pytest.raises(TypeError, match="Message 2 is"):
        clrp.chat(model, [ASKED, {"content": "x"}])
    with pytest.raises(TypeError, match="content of message 1 is an int"):
        clrp.chat(model, [{"role": "user", "content": 3}])
    with pytest.raises(PromptError, match="no place for tools"):
        clrp.chat(model_of("phi3"), [ASKED], tools=[WEATHER])
    with pytest.raises(PromptError, match="no chat template"):
        clrp.chat(forms.booted("gpt2"), [ASKED])
    with pytest.raises(PromptError, match="tool call of message 1 has no name"):
        clrp.chat(model, [{"role": "assistant", "tool_calls": [{"x": 1}]}, ASKED])


def test_the_messages_are_not_changed() -> None:
    calls = [tool_call("weather", {"town": "Rome"}, "qwen3")]
    messages = [
        ASKED,
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "sun"},
    ]
    before = copy.deepcopy(messages)
    clrp.chat(model_of("qwen3"), messages, tools=[WEATHER])
    assert messages == before


@pytest.mark.parametrize("form", ["llama3", "qwen"])
def test_its_own_ids_are_explained(form: str, recwarn: pytest.WarningsRecorder) -> None:
    family = {"llama3": "llama3", "qwen": "qwen3"}[form]
    model = model_of(family)
    prompt = clrp.chat(model, [ASKED], answer="It")
    names = {"target": 200, "contrast": 210}
    result = clrp.attribute(model, prompt, **names)
    by_ids = clrp.attribute(model, prompt.tokens, **names)
    assert torch.equal(result.token_ids, prompt.tokens)
    assert torch.equal(result.tokens, by_ids.tokens)
    assert result.segments == prompt.segments
    assert by_ids.segments == ()
    assert result.prepended_bos is None
    [again, _] = clrp.attribute_each(
        model, [prompt, prompt], [clrp.logit_diff(model, 200, 210)] * 2
    )
    assert again.segments == prompt.segments
    logits = forms.true_logits(form, prompt.tokens.tolist())
    assert abs(result.delta - float(logits[200] - logits[210])) < 1e-9
    assert not [w for w in recwarn if "BOS" in str(w.message)]
    with pytest.raises(PromptError, match="prepend_bos=True is for texts"):
        clrp.attribute(model, prompt, **names, prepend_bos=True)
    copied = pickle.loads(pickle.dumps(prompt))
    assert (copied, copied.segments) == (prompt, prompt.segments)
    assert torch.equal(copied.tokens, prompt.tokens)


def test_a_chat_of_another_model_is_refused() -> None:
    prompt = clrp.chat(model_of("qwen3"), [ASKED])
    with pytest.raises(PromptError, match="another tokenizer"):
        clrp.attribute(model_of("llama3"), prompt, target=200, contrast=210)


def test_long_chats_are_followed_by_their_edges(monkeypatch: pytest.MonkeyPatch) -> None:
    from tl_contrastive_lrp.inputs import message_spans

    monkeypatch.setattr(message_spans, "_PRIVATE", (range(0), range(0), range(0xF0000, 0xF0040)))
    messages = [
        {"role": "user", "content": "abc " * 100},
        {"role": "assistant", "content": "d" * 99},
    ]
    prompt = clrp.chat(model_of("qwen3"), [*messages, ASKED])
    assert [text for _, text in kinds(prompt)] == ["abc " * 100, "d" * 99, "2 + 2?"]


# Tokenizers that change texts: composed characters, lower case, spaces.
NORMALISING = {"qwen": "Cafe\u0301 Zu\u0308rich e\u0301", "bert": "The CAPITAL", "t5": "a  b c"}


@pytest.mark.parametrize("form", NORMALISING)
def test_tokenizers_that_change_texts(form: str) -> None:
    """Each token is that of its message alone, or between two of the template's own signs."""
    from truth import tokenizer_forms

    model = tokenizer_forms.boot(form)
    before = model.tokenizer.chat_template
    model.tokenizer.chat_template = (
        "{% for m in messages %}{{ '| ' + m.content + ' |' }}{% endfor %}"
    )
    try:
        chat = [{"role": "user", "content": NORMALISING[form]}, {"role": "user", "content": "x y"}]
        prompt = clrp.chat(model, chat)
        is_division(prompt)
        assert [text for _, text in kinds(prompt)] == [m["content"] for m in chat]
        for segment, message in zip(
            [s for s in prompt.segments if s.kind == "user"], chat, strict=True
        ):
            got = model.tokenizer.decode(prompt.tokens[segment.start : segment.stop])
            own = model.tokenizer(message["content"], add_special_tokens=False)["input_ids"]
            assert got.split() == model.tokenizer.decode(own).split()
    finally:
        model.tokenizer.chat_template = before


XML_CALLS = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.tool_calls %}{% for tc in m.tool_calls %}"
    "\n<tool_call>{{ tc.function.name }}\n{% for k, v in tc.function.arguments.items() %}"
    "<arg_key>{{ k }}</arg_key>\n"
    "<arg_value>{{ v | tojson if v is not string else v }}</arg_value>\n"
    "{% endfor %}</tool_call>{% endfor %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("arguments", "last"),
    [
        ({"town": "Zürich", "n": 3}, "<arg_value>3"),
        ({"n": 3, "town": "Zürich"}, "<arg_value>Zürich"),
        ({"deep": {"a": [1, True]}}, '<arg_value>{"a": [1, true]}'),
        ({"yes": True}, "<arg_value>true"),
        ({}, "look"),
    ],
)
def test_tool_calls_that_are_no_json(arguments: dict[str, Any], last: str) -> None:
    """As GLM and Qwen3-Coder write them: the call is from its name to its last value."""
    model = forms.booted("qwen")
    model.tokenizer.chat_template = XML_CALLS
    calls = [tool_call("look", arguments, ""), tool_call("look", arguments, "")]
    chat = [ASKED, {"role": "assistant", "tool_calls": calls}, {"role": "tool", "content": "3"}]
    prompt = clrp.chat(model, chat)
    is_division(prompt)
    found = [s for s in prompt.segments if s.kind == "tool call"]
    assert [s.name for s in found] == ["tool call 1: look", "tool call 2: look"]
    for segment in found:
        assert segment.text.startswith("look")
        assert segment.text.endswith(last)
    pieces = str(prompt).split("<tool_call>")[1:]
    assert [s.text for s in found] == [piece[: len(found[0].text)] for piece in pieces]
    assert kinds(prompt)[-1] == ("tool result", "3")


@st.composite
def agent_chats(draw: Any) -> list[dict[str, Any]]:
    """Turns with thoughts, tool calls and results, as an agent on Qwen3 has them."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": draw(TEXT)}]
    for _ in range(draw(st.integers(1, 2))):
        messages.append({"role": "user", "content": draw(TEXT)})
        for _ in range(draw(st.integers(0, 2))):
            said: dict[str, Any] = {"role": "assistant", "content": draw(TEXT)}
            if draw(st.booleans()):
                said["reasoning_content"] = draw(TEXT)
            texts = draw(st.lists(TEXT, min_size=1, max_size=2))
            said["tool_calls"] = [tool_call("look", {"at": t, "n": 3}, "qwen3") for t in texts]
            messages.append(said)
            messages += [{"role": "tool", "content": draw(TEXT)} for _ in texts]
        messages.append({"role": "assistant", "content": draw(TEXT)})
    return messages[:-1]


@settings(max_examples=60)
@given(messages=agent_chats())
def test_random_agents(messages: list[dict[str, Any]]) -> None:
    """The truth: texts and arguments under names of their own, split from Hugging Face's text."""
    named, truth_of = copy.deepcopy(messages), {}

    def name(text: str, kind: str) -> str:
        word = f"W{len(truth_of)}ZQ"
        truth_of[word] = (kind, text)
        return word

    kind_of = {"tool": "tool result"}
    for message in named:
        role = message["role"]
        message["content"] = name(message["content"], kind_of.get(role, role))
        if "reasoning_content" in message:
            message["reasoning_content"] = name(message["reasoning_content"], "thinking")
        for call in message.get("tool_calls", ()):
            function = call["function"]
            written = json.dumps(function, ensure_ascii=False)
            function["name"] = name(written, "tool call")
            function["arguments"] = {}
    text = hf("qwen3", named).replace('", "arguments": {}}', "").replace('{"name": "', "")
    pieces = [truth_of.get(p, ("template", p)) for p in re.split(r"(W\d+ZQ)", text) if p]
    # The last turn's template strips line ends of what was said and thought.
    prompt = clrp.chat(model_of("qwen3"), messages)
    is_division(prompt)
    is_by_token(prompt)
    assert prompt.tokens.tolist() == hf_ids("qwen3", messages)
    got = [(s.kind, s.text) for s in prompt.segments]
    assert [kind for kind, _ in got] == [kind for kind, _ in pieces]
    for (kind, mine), (_, true) in zip(got, pieces, strict=True):
        stripped = {true, true.strip("\n"), true.lstrip("\n")}
        assert mine in (stripped if kind in ("assistant", "thinking") else {true})
