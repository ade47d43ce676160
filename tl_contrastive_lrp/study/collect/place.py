"""What a locator gets: a failed completion, and ways to ask what would have become of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from ..benchmarks.item import Benchmark, Item
from .generate import Greedy, Reading

# Gets an item and what each token of its completion contributes to the text; answers with the index
# of the first wrong token, or None.
Judge = Callable[[Item, Sequence[str]], int | None]


@dataclass(frozen=True, eq=False)
class Completion:
    """What a model wrote for one item.

    Attributes:
        item: The item.
        prompt: The whole text before the completion.
        prompt_ids: Its ids.
        ids: Ids of the completion, with the token that ended it where one did.
        text: Its text, without special tokens.
        pieces: What each token contributes to the text, special tokens included.
        ended: Whether the model ended it; otherwise the limit did.
    """

    item: Item
    prompt: str
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    text: str
    pieces: tuple[str, ...]
    ended: bool


class Failure:
    """A completion that its checker calls wrong, with its logits and checked rollouts.

    Each rollout is written and checked once, however many locators and contrasts ask for it; none
    is written where the benchmark can tell of the other token that no answer can pass any more.

    Args:
        completion: The completion.
        benchmark: Its checker.
        writer: The model that wrote it.
        limit: The most tokens of a completion.
        reference: A right completion to compare with; None where there is none.
        judges: Callables that say where the error begins.
        open_rollouts: Whether rollouts that the limit cuts off may pass while they still can, as
            ``CollectSettings`` says.

    Attributes:
        n_rollouts: How many rollouts were written.
    """

    def __init__(
        self,
        completion: Completion,
        benchmark: Benchmark,
        writer: Greedy,
        limit: int,
        reference: str | None = None,
        judges: Sequence[Judge] = (),
        open_rollouts: bool = False,
    ) -> None:
        self.completion, self.benchmark, self.writer = completion, benchmark, writer
        self.limit, self.reference, self.judges = limit, reference, tuple(judges)
        self.open_rollouts = open_rollouts
        self.n_rollouts = 0
        self._passes: dict[tuple[int, int], bool] = {}

    @property
    def item(self) -> Item:
        """The item."""
        return self.completion.item

    @cached_property
    def reading(self) -> Reading:
        """One forward of the writer over prompt and completion.

        Where all rollouts start at one place, one over what is before it does as well; set it, and
        none is run.
        """
        return self.writer.read(self.completion.prompt_ids, self.completion.ids)

    def passes(self, branches: Sequence[tuple[int, int]]) -> list[bool]:
        """Whether the completion passes with another token at a place, and a rollout from there.

        Args:
            branches: The index in the completion, and the token to put there.

        Returns:
            For each branch whether the checker passes the whole completion.
        """
        unknown = [b for b in dict.fromkeys(branches) if b not in self._passes]
        new = [b for b in unknown if not self._rules_out(*b)]
        self._passes |= dict.fromkeys(set(unknown) - set(new), False)
        if new:
            self.n_rollouts += len(new)
            for branch, ids in zip(
                new, self.writer.roll(self.reading, new, self.limit), strict=True
            ):
                text = self.writer.text(ids)
                verdict = self.benchmark.check(self.item, text)
                is_open = self.open_rollouts and ids[-1] not in self.writer.end_ids
                passed = verdict.passed
                written = branch[0], self.completion.ids[branch[0]]
                if verdict.failed and is_open and self._rules_out(*written):
                    passed = self._can_pass(text) is not False
                self._passes[branch] = passed
        return [self._passes[b] for b in branches]

    def _rules_out(self, position: int, token: int) -> bool:
        """Whether the benchmark can tell that this token breaks the answer for good."""
        return self._can_pass(self.writer.text((*self.completion.ids[:position], token))) is False

    def _can_pass(self, beginning: str) -> bool | None:
        # The bytes of a character that is not whole yet say nothing.
        return self.benchmark.can_pass(self.item, beginning.rstrip("\ufffd"))
