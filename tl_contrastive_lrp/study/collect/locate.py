"""Where a wrong completion goes wrong: locators of the first wrong token.

A locator is a callable ``locate(failure, settings)`` that answers with an index in the
completion's ids, or None if it cannot tell. These come with the package, by name:

- "given": the index that the item carries (``row["target_position"]``), or that a benchmark with
  planted truth knows (its method ``first_wrong``).
- "divergence": the first token whose text leaves the reference completion.
- "constraint": the first token after which ``benchmark.can_pass`` is False. An answer that breaks
  nothing but ends too early is not located: ``can_pass`` is None then, as where a benchmark cannot
  tell whether the text has gone wrong, so the end token is not known to be the first wrong one.
- "recovery": the first position, among those tried, at which another token and a greedy rollout
  from there pass the checker. At a position the ``recovery_top_k`` tokens that follow the written
  one in rank are tried; a position whose tokens are all within ``min_delta`` of the written one is
  passed over, since its case would be dropped later. Up to ``max_rollouts`` rollouts are spent
  where a token that can make a case is closest to the written one. Of the positions at which one
  passes, the first in the text is the answer, also if that token is too close to make a case.
- "judge": callables that get the item and the completion's tokens and answer with an index; more
  than half of them must agree.

``register_locator`` adds one by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

from ...errors import a_kind
from .place import Failure


class RecoverySettings(Protocol):
    """What locators may read of ``CollectSettings``."""

    @property
    def min_delta(self) -> float:
        """Least Δℓ of a case."""
        ...

    @property
    def recovery_top_k(self) -> int:
        """Tokens tried at a position."""
        ...

    @property
    def max_rollouts(self) -> int:
        """Most rollouts of a completion."""
        ...


Locator = Callable[[Failure, RecoverySettings], "int | None"]


def leaves(pieces: Sequence[str], reference: str, ended: bool) -> int | None:
    """The first token with which a text is no longer a beginning of another one.

    Args:
        pieces: What each token contributes; the last is the end token if ``ended``.
        reference: The other text.
        ended: Whether the text ends with its last token.

    Returns:
        The token's index: that of the end token where the text stops too early; None where the
        text equals the reference, or is cut off within it.
    """
    at = 0
    for i, piece in enumerate(pieces):
        if ended and i == len(pieces) - 1:
            return None if at == len(reference) else i
        if reference[at : at + len(piece)] != piece:
            return i
        at += len(piece)
    return None


def given(failure: Failure, settings: RecoverySettings) -> int | None:  # noqa: ARG001
    """The index that the item carries, or that the benchmark's planted truth gives.

    Args:
        failure: The failure.
        settings: Not used.

    Returns:
        The index, or None.
    """
    done = failure.completion
    index = done.item.row.get("target_position")
    if isinstance(index, int) and not isinstance(index, bool):
        return index if 0 <= index < len(done.ids) else None
    truth = getattr(failure.benchmark, "first_wrong", None)
    return None if truth is None else truth(done.item, done.pieces, done.ended)


def divergence(failure: Failure, settings: RecoverySettings) -> int | None:  # noqa: ARG001
    """The first token whose text leaves the reference completion.

    Args:
        failure: The failure.
        settings: Not used.

    Returns:
        The index, or None without a reference, or where the texts are equal.
    """
    if not failure.reference:
        return None
    return leaves(failure.completion.pieces, failure.reference, failure.completion.ended)


def constraint(failure: Failure, settings: RecoverySettings) -> int | None:  # noqa: ARG001
    """The first token after which the checker can no longer pass.

    Args:
        failure: The failure.
        settings: Not used.

    Returns:
        The index, or None where the benchmark cannot tell.
    """
    done, writer = failure.completion, failure.writer
    last = len(done.ids) - (1 if done.ended else 0)
    for i in range(last):
        # The bytes of a character that is not whole yet say nothing.
        beginning = writer.text(done.ids[: i + 1]).rstrip("\ufffd")
        if failure.benchmark.can_pass(done.item, beginning) is False:
            return i
    return None


def recovery(failure: Failure, settings: RecoverySettings) -> int | None:
    """The first tried position at which another token and a rollout pass the checker.

    Args:
        failure: The failure.
        settings: ``min_delta``, ``recovery_top_k`` and ``max_rollouts``.

    Returns:
        The index, or None if no rollout passes.
    """
    import torch

    ids = torch.tensor(failure.completion.ids)
    rows = failure.reading.logits[: len(ids)]
    top = rows.topk(min(settings.recovery_top_k + 1, rows.shape[1]), dim=1)
    behind = top.values[:, :1] - top.values[:, 1:]
    # how far behind the first token is that can make a case; inf where none can
    behind = behind.masked_fill(behind <= settings.min_delta, float("inf")).amin(1)
    possible = (top.indices[:, 0] == ids) & behind.isfinite()
    order = torch.argsort(behind, stable=True)
    positions = order[possible[order]][: settings.max_rollouts // settings.recovery_top_k]
    tried = sorted(positions.tolist())
    branches = [(p, token) for p in tried for token in top.indices[p, 1:].tolist()]
    passed = failure.passes(branches)
    return next((p for (p, _), ok in zip(branches, passed, strict=True) if ok), None)


def judge(failure: Failure, settings: RecoverySettings) -> int | None:  # noqa: ARG001
    """The index on which more than half of the judges agree.

    Args:
        failure: The failure, with its judges.
        settings: Not used.

    Returns:
        The index, or None without a majority.

    Raises:
        ValueError: A judge answers with something that is no index of the completion.
    """
    done = failure.completion
    votes: Counter[int] = Counter()
    for vote in (judge(done.item, done.pieces) for judge in failure.judges):
        if vote is None:
            continue
        if not isinstance(vote, int) or isinstance(vote, bool) or not 0 <= vote < len(done.ids):
            raise ValueError(
                f"A judge answered {vote!r} for item {done.item.id!r}; an index in "
                f"0..{len(done.ids) - 1} or None was asked for."
            )
        votes[vote] += 1
    for index, n in votes.items():
        if 2 * n > len(failure.judges):
            return index
    return None


LOCATORS: dict[str, Locator] = {
    "given": given,
    "divergence": divergence,
    "constraint": constraint,
    "recovery": recovery,
    "judge": judge,
}


def register_locator(name: str, locator: Locator) -> None:
    """Make a locator known by name, so that a study's file can ask for it.

    Args:
        name: Its name.
        locator: A callable that gets a ``Failure`` and the settings, and answers with an index in
            the completion or None.

    Raises:
        ValueError: The name is taken.
        TypeError: It cannot be called.

    Example:
        >>> def first_digit(failure, settings):
        ...     pieces = failure.completion.pieces
        ...     return next((i for i, piece in enumerate(pieces) if piece.strip().isdigit()), None)
        >>> clrp.study.register_locator("first digit", first_digit)
        >>> clrp.study.CollectSettings(locators=("first digit",)).locators
        ('first digit',)
    """
    if not callable(locator):
        raise TypeError(f"The locator {name!r} is {a_kind(locator)}, not a callable.")
    if name in LOCATORS and LOCATORS[name] is not locator:
        raise ValueError(f"There is a locator {name!r} already; choose another name.")
    LOCATORS[name] = locator


def locator_of(name: str) -> Locator:
    """The locator of a name.

    Args:
        name: Its name.

    Returns:
        The locator.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in LOCATORS:
        raise ValueError(f"unknown locator: {name!r}. Use one of {', '.join(map(repr, LOCATORS))}.")
    return LOCATORS[name]
