"""From items to cases: complete, check, locate, contrast, and keep what is clean.

A chunk of items is the unit of work. Each item of it becomes a ``Case``, or a ``Dropped`` that says
why not. A case holds what the model itself says of the case's ids, alone and unpadded: the target
is its first choice there, and Δℓ is above ``min_delta``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ...errors import PromptError
from ...inputs.chats import chat
from ...inputs.tokens import str_tokens, to_single_prompt, token_names
from ..benchmarks.item import Benchmark, Item
from ..cases import Case, Dropped, Provenance, Verdict
from ..models import ModelSpec, check_same_tokens
from .contrast import CONTRASTS, find_contrast
from .generate import Greedy
from .locate import locator_of
from .place import Completion, Failure, Judge
from .spans import character_spans, instruction_tokens


@dataclass(frozen=True)
class CollectSettings:
    """How failures are collected.

    Attributes:
        max_new_tokens: The most tokens of a completion, and of a rollout with what is before it.
        batch_size: Rows written at once.
        thinking: Whether the model is to think first. False is also right for templates without
            that choice; None leaves it to the template.
        locators: Names of locators, tried in turn until one gives an index.
        contrast: Which of "own", "sibling" and "given" to try, in turn.
        top_k: How many of a model's most probable tokens can be the contrast.
        min_delta: Cases with Δℓ at or below this are dropped.
        recovery_top_k: Tokens that the locator "recovery" tries at a position.
        max_rollouts: The most rollouts of that locator for one completion.
        max_prompt_tokens: Longer prompts are dropped; None for what the context holds.
        open_rollouts: Whether a rollout that ``max_new_tokens`` cuts off passes too where the
            checker says no but ``Benchmark.can_pass`` does not, as an answer that is only too short
            so far. It counts only where ``can_pass`` rules the written token out.

    Raises:
        ValueError: A number is out of range, or a name is unknown.

    Example:
        >>> clrp.study.CollectSettings(locators=("given",)).contrast
        ('own', 'sibling', 'given')
    """

    max_new_tokens: int = 256
    batch_size: int = 8
    thinking: bool | None = False
    locators: tuple[str, ...] = ("constraint", "recovery")
    contrast: tuple[str, ...] = CONTRASTS
    top_k: int = 10
    min_delta: float = 1.0
    recovery_top_k: int = 3
    max_rollouts: int = 48
    max_prompt_tokens: int | None = None
    open_rollouts: bool = False

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size", "recovery_top_k", "max_rollouts"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}; give a positive whole number.")
        if not isinstance(self.top_k, int) or self.top_k < 2:
            raise ValueError(f"top_k is {self.top_k!r}; the target and one other make 2.")
        if not self.min_delta >= 0:
            raise ValueError(f"min_delta is {self.min_delta!r}; give 0 or more.")
        if self.max_rollouts < self.recovery_top_k:
            raise ValueError(
                f"max_rollouts is {self.max_rollouts}, fewer than recovery_top_k="
                f"{self.recovery_top_k}, the rollouts of one position."
            )
        if not self.locators:
            raise ValueError("locators is empty; name at least one.")
        for name in self.locators:
            locator_of(name)
        for name in self.contrast:
            if name not in CONTRASTS:
                raise ValueError(
                    f"unknown contrast: {name!r}. Use one of {', '.join(map(repr, CONTRASTS))}."
                )


class Logged(Protocol):
    """A completion that a log holds: what ``collect_logged`` reads of it."""

    @property
    def prompt_ids(self) -> Sequence[int]:
        """Ids of the prompt."""
        ...

    @property
    def completion_ids(self) -> Sequence[int]:
        """Ids of the completion."""
        ...

    @property
    def verdict(self) -> Verdict | None:
        """What the log's own checker said; None or unchecked to ask the benchmark's."""
        ...


def complete(
    model: Any, items: Sequence[Item], settings: CollectSettings
) -> list[Completion | Dropped]:
    """Ask a model the items of one chunk, greedily and in batches.

    Args:
        model: A ``TransformerBridge``.
        items: The items of the chunk.
        settings: ``max_new_tokens``, ``batch_size``, ``thinking`` and ``max_prompt_tokens``.

    Returns:
        For each item its completion, or, without the benchmark's name, why there is none.

    Raises:
        PromptError: The model has no chat template, or cannot be told to think.
    """
    return _complete(Greedy(model, settings.batch_size), items, settings, "")


def _complete(
    writer: Greedy, items: Sequence[Item], settings: CollectSettings, benchmark: str
) -> list[Completion | Dropped]:
    prompts = [_prompt(writer.model, item, settings.thinking) for item in items]
    most = writer.n_ctx - settings.max_new_tokens
    if settings.max_prompt_tokens is not None:
        most = min(most, settings.max_prompt_tokens)
    fits = [i for i, (_, ids) in enumerate(prompts) if len(ids) <= most]
    new = writer.write([prompts[i][1] for i in fits], [settings.max_new_tokens] * len(fits))
    written = dict(zip(fits, new, strict=True))
    return [
        _completion(writer, item, text, ids, written[i])
        if i in written
        else Dropped(
            _case_id(benchmark, item),
            benchmark,
            "too long",
            f"{len(ids)} tokens of the prompt and {settings.max_new_tokens} of the completion; "
            f"the prompt may have {most}",
        )
        for i, (item, (text, ids)) in enumerate(zip(items, prompts, strict=True))
    ]


def _completion(
    writer: Greedy, item: Item, prompt: str, prompt_ids: tuple[int, ...], ids: tuple[int, ...]
) -> Completion:
    ended = bool(ids) and ids[-1] in writer.end_ids
    pieces = writer.pieces(prompt_ids, ids)
    return Completion(item, prompt, prompt_ids, ids, writer.text(ids), pieces, ended)


def _prompt(model: Any, item: Item, thinking: bool | None) -> tuple[str, tuple[int, ...]]:
    if item.messages is None:
        if not item.prompt:
            raise PromptError(f"Item {item.id!r} has neither messages nor a prompt.")
        return item.prompt, tuple(to_single_prompt(model, item.prompt)[0].tolist())
    if thinking is False and not _can_think(model, item):
        thinking = None
    made = chat(model, item.messages, tools=item.tools, enable_thinking=thinking)
    return str(made), tuple(made.tokens.tolist())


def _can_think(model: Any, item: Item) -> bool:
    """Whether the chat template writes something else when it is told not to think."""

    def text(value: bool) -> str:
        return str(
            model.tokenizer.apply_chat_template(
                [dict(m) for m in item.messages or ()],
                tools=list(item.tools) if item.tools else None,
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=value,
                thinking=value,
            )
        )

    return text(True) != text(False)


def collect(
    model: Any,
    benchmark: Benchmark,
    items: Sequence[Item],
    settings: CollectSettings,
    *,
    spec: ModelSpec,
    siblings: Mapping[str, Any] | Sequence[tuple[str, Any]] = (),
    judges: Sequence[Judge] = (),
    sandbox: Callable[..., bool] | None = None,
    writer: Any = None,
    model_fingerprint: str = "",
) -> list[Case | Dropped]:
    """Collect the failures of one chunk of a benchmark's items.

    Args:
        model: The model whose failures are collected, a ``TransformerBridge``.
        benchmark: The items' benchmark.
        items: The chunk.
        settings: How.
        spec: How the study names the model, for the cases' provenance.
        siblings: Stronger models of the same tokenizer, by name, for contrasts.
        judges: For the locator "judge": callables that get the item and the completion's tokens
            and answer with the index of the first wrong one, or None.
        sandbox: Runs code for benchmarks that need it and were opened without one.
        writer: The same model in a faster dtype, to write completions and rollouts; None for
            ``model``. The target's rank and Δℓ are always those of ``model``.
        model_fingerprint: ``fingerprint(model)``, if it is known.

    Returns:
        A case or the reason why there is none, for each item in order.

    Raises:
        PromptError: The model has no chat template, or cannot be told to think.
        TokenizerMismatchError: A sibling has another tokenizer.
    """
    benchmark = _with_sandbox(benchmark, sandbox)
    greedy = Greedy(model if writer is None else writer, settings.batch_size)
    return _collected(
        model, greedy, benchmark, _complete(greedy, items, settings, benchmark.name), settings,
        spec=spec, siblings=siblings, judges=judges, model_fingerprint=model_fingerprint,
    )  # fmt: skip


def collect_logged(
    model: Any,
    benchmark: Benchmark,
    items: Sequence[Item],
    logged: Sequence[Logged],
    settings: CollectSettings,
    *,
    spec: ModelSpec,
    siblings: Mapping[str, Any] | Sequence[tuple[str, Any]] = (),
    judges: Sequence[Judge] = (),
    sandbox: Callable[..., bool] | None = None,
    model_fingerprint: str = "",
) -> list[Case | Dropped]:
    """Collect failures from completions that a log holds, without writing them again.

    A target that is not the model's first choice, as where the log's decoding was sampled or its
    model another one, is dropped.

    Args:
        model: The model that wrote them, a ``TransformerBridge``.
        benchmark: The items' benchmark.
        items: The items, one for each logged completion.
        logged: The completions, with exact ids.
        settings: How; ``thinking`` is not used.
        spec: How the study names the model.
        siblings: As in ``collect``.
        judges: As in ``collect``.
        sandbox: As in ``collect``.
        model_fingerprint: As in ``collect``.

    Returns:
        A case or the reason why there is none, for each completion in order.

    Raises:
        ValueError: There are not as many items as completions.
        TokenizerMismatchError: A sibling has another tokenizer.
    """
    if len(items) != len(logged):
        raise ValueError(f"There are {len(items)} items, but {len(logged)} logged completions.")
    benchmark = _with_sandbox(benchmark, sandbox)
    greedy = Greedy(model, settings.batch_size)
    done: list[Completion | Dropped] = []
    verdicts: list[Verdict | None] = []
    for item, log in zip(items, logged, strict=True):
        prompt_ids, ids = tuple(log.prompt_ids), tuple(log.completion_ids)
        verdicts.append(log.verdict)
        n = len(prompt_ids) + len(ids)
        most = settings.max_prompt_tokens
        detail = ""
        if n > greedy.n_ctx:
            detail = f"{n} tokens; the context has {greedy.n_ctx}"
        elif most is not None and len(prompt_ids) > most:
            detail = f"{len(prompt_ids)} tokens of the prompt; max_prompt_tokens is {most}"
        if detail:
            done.append(Dropped(_case_id(benchmark.name, item), benchmark.name, "too long", detail))
            continue
        prompt = "".join(str_tokens(model, prompt_ids))
        done.append(_completion(greedy, item, prompt, prompt_ids, ids))
    return _collected(
        model, greedy, benchmark, done, settings, spec=spec, siblings=siblings, judges=judges,
        model_fingerprint=model_fingerprint, verdicts=verdicts,
    )  # fmt: skip


def _with_sandbox(benchmark: Benchmark, sandbox: Callable[..., bool] | None) -> Benchmark:
    if sandbox is None or getattr(benchmark, "sandbox", sandbox) is not None:
        return benchmark
    ours: Any = copy.copy(benchmark)
    ours.sandbox = sandbox
    return ours  # type: ignore[no-any-return]


def _collected(
    model: Any,
    writer: Greedy,
    benchmark: Benchmark,
    completions: Sequence[Completion | Dropped],
    settings: CollectSettings,
    *,
    spec: ModelSpec,
    siblings: Mapping[str, Any] | Sequence[tuple[str, Any]],
    judges: Sequence[Judge],
    model_fingerprint: str,
    verdicts: Sequence[Verdict | None] | None = None,
) -> list[Case | Dropped]:
    from ... import __version__

    stronger = dict(siblings)
    for sibling in stronger.values():
        check_same_tokens(model, sibling)
    readers = {name: Greedy(m, settings.batch_size) for name, m in stronger.items()}
    exact = writer if writer.model is model else Greedy(model, settings.batch_size)
    decoding = {
        "method": "greedy",
        "max_new_tokens": settings.max_new_tokens,
        "batch_size": settings.batch_size,
        "thinking": settings.thinking,
        "dtype": str(writer.model.cfg.dtype).removeprefix("torch."),
    }
    if verdicts is not None:
        decoding = {"method": "logged"}
    found: list[Case | Dropped] = []
    for i, done in enumerate(completions):
        if isinstance(done, Dropped):
            found.append(done)
            continue
        source = Provenance(
            spec.model, spec.revision, model_fingerprint, decoding, __version__, done.item.source
        )
        verdict = None if verdicts is None else verdicts[i]
        found.append(
            _one(exact, writer, benchmark, done, verdict, settings, source, readers, judges)
        )
    return found


def _one(
    exact: Greedy,
    writer: Greedy,
    benchmark: Benchmark,
    done: Completion,
    verdict: Verdict | None,
    settings: CollectSettings,
    source: Provenance,
    siblings: Mapping[str, Greedy],
    judges: Sequence[Judge],
) -> Case | Dropped:
    """The case of one completion."""
    item = done.item
    name = _case_id(benchmark.name, item)

    def dropped(reason: str, detail: str = "") -> Dropped:
        return Dropped(name, benchmark.name, reason, detail)

    if verdict is None or not verdict.checked:
        verdict = benchmark.check(item, done.text)
    if verdict.passed:
        return dropped("passes")
    if not verdict.checked:
        return dropped("unchecked", verdict.reason)
    reference = item.row.get("reference_completion", item.reference)
    # A completion of a log may be longer than new ones; nothing is written past the context.
    limit = max(settings.max_new_tokens, len(done.ids))
    limit = min(limit, exact.n_ctx - len(done.prompt_ids))
    failure = Failure(done, benchmark, writer, limit, reference, judges, settings.open_rollouts)
    position, locator = None, ""
    for locator in settings.locators:
        position = locator_of(locator)(failure, settings)
        if position is not None:
            break
    if position is None:
        return dropped("not located", f"{verdict.reason}; tried: {', '.join(settings.locators)}")
    if not 0 <= position < len(done.ids):
        raise ValueError(
            f"The locator {locator!r} answered {position} for {name}, whose completion has "
            f"{len(done.ids)} tokens."
        )
    target = done.ids[position]
    before = exact.read(done.prompt_ids, done.ids[:position])
    logits = before.logits[-1]
    if writer is exact and not failure.n_rollouts:
        failure.reading = before  # no locator has rolled anything, and contrasts start here
    where = f"by {locator}, token {position}"
    if int(logits.argmax()) != target:
        rank = int((logits > logits[target]).sum()) + 1
        return dropped("not the top token", f"{where}: rank {rank}")
    pair = find_contrast(failure, position, logits, settings.contrast, settings.top_k, siblings)
    if pair is None:
        return dropped("no contrast", where)
    contrast, contrast_source = pair
    delta = float(logits[target] - logits[contrast])
    if not delta > settings.min_delta:
        return dropped("small delta", f"{where}: {delta:.3f}")
    names = token_names(exact.model, (target, contrast))
    texts = str_tokens(exact.model, done.prompt_ids)
    return Case(
        id=name,
        benchmark=benchmark.name,
        prompt=done.prompt,
        prompt_ids=done.prompt_ids,
        completion=done.text,
        completion_ids=done.ids,
        target_position=position,
        target_id=target,
        target=names[0],
        contrast_id=contrast,
        contrast=names[1],
        delta=delta,
        verdict=verdict,
        provenance=source,
        messages=item.messages,
        tools=item.tools,
        reference=item.reference,
        segments=instruction_tokens(done.prompt, texts, item),
        decisive_positions=_decisive(benchmark, done, texts, position),
        locator=locator,
        contrast_source=contrast_source,
    )


def _decisive(
    benchmark: Benchmark, done: Completion, texts: Sequence[str], position: int
) -> tuple[int, ...] | None:
    """Positions that planted truth calls decisive, if the benchmark has any."""
    truth = getattr(benchmark, "decisive_spans", None)
    if truth is None or not done.item.messages:
        return None
    asked = str(done.item.messages[-1]["content"])
    start = done.prompt.rfind(asked)
    spans = truth(done.item, "".join(done.pieces[:position]))
    if spans is None or start < 0:
        return None
    in_user, in_answer = spans
    moved = [(start + a, start + b) for a, b in in_user]
    moved += [(len(done.prompt) + a, len(done.prompt) + b) for a, b in in_answer]
    return character_spans((*texts, *done.pieces[:position]), moved)


def _case_id(benchmark: str, item: Item) -> str:
    return f"{benchmark}/{item.id}" if benchmark else item.id
