"""The frozen result of explaining one prediction, and its file format.

The file is safetensors: tensors plus one JSON text, no pickle, nothing executable. This module is
long because every method of the one class that users hold documents itself with an example.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..files import FileKind, read_result, rebuilding_from, write_result
from ..graph.picture import view_of
from ..hooks.coverage import Coverage, coverage_from
from ..inputs.forced import SIDES, labelled, with_answer
from ..inputs.objective import check_earlier, in_words
from ..inputs.segments import How, Segment, check_segments
from ..inputs.spans import LOGPROB
from ..inputs.token_text import printed
from ..render.report import Report, report_html
from ..render.text import visible
from .answer_parts import AnswerRelevance, answer_from, facts_of, read_part, tensors_of
from .ledger import Ledger, LedgerRow

if TYPE_CHECKING:
    import pandas as pd
    from circuitsvis.utils.render import RenderedHTML

    from ..effects.token_effects import Replace
    from ..graph.graph import AttributionGraph
    from .check.result import MapCheck

_FILE = FileKind("tl_contrastive_lrp.attribution", 1, "the attribution")

_PREVIEW = 48  # characters of a message shown in the report's table of messages

_TENSORS = ("tokens", "resid", "heads", "neurons", "token_ids", "special")


@dataclass(frozen=True, eq=False)
class Attribution:
    """Relevance of the input tokens, hidden states, heads and neurons for one prediction.

    All relevance is in logits, with the sign of the objective: positive supports the target
    (usually the wrong token), negative the contrast. Tensors are on the CPU.

    Attributes:
        tokens: Relevance of each input token: of its embedding, without position embeddings.
        resid: Relevance of each hidden state: rows as ``sites``, the last one before the final
            norm.
        heads: Relevance of each attention head's output z at the position where it writes.
        neurons: Relevance of each MLP neuron (``hook_post``), if requested.
        token_ids: The prompt.
        special: Which tokens are special tokens of the tokenizer.
        str_tokens: What each token contributes to the prompt's text: joined, they are that text.
            A character of several tokens is at the first; the others are empty.
        sites: HookPoint name of each row of ``resid``.
        delta: Δℓ, the objective's value.
        target_logit: The objective's target term (mean logit of the targets; of a span, the sum of
            its logits or log-probabilities).
        contrast_logit: Its contrast term, if it has one.
        objective: The objective in words, with its sign.
        target: Name of the target token(s); given as a target, it means that token.
        contrast: Name of the token or tokens that it is contrasted with, "" for none.
        rules: Name of the rule set.
        coverage: Which component got which rule.
        ledger: Where Δℓ went.
        model_name: As TransformerLens calls the model.
        pos: Position whose next token is explained, from 0. If there are several, the last of them,
            so that by causality nothing after it has relevance.
        target_is_top: Whether the target is the token that greedy decoding writes there; False
            for an objective without target tokens.
        memory: "plain", or "tiled (tile N)" where the backward ran on N positions at a time.
        prepended_bos: Whether a BOS token that the text does not contain was put before it; None
            where ids were given, and in files of versions that did not record it.
        earlier_pos: The other positions explained, in rising order, where the objective is a
            function of several; ``positions`` lists all of them.
        attention: How attention was computed: "eager", "fused", or in how many blocks it was fused.
        answer: Where two answers were explained (``answer_diff``), the answers and the relevance of
            their own tokens. Everything else is then of the prompt, which ends with what both
            answers begin with; only the ledger counts the answers' tokens too.
        segments: The messages of a prompt that ``chat`` made, and the template's text between
            them; () for any other prompt. ``by`` sums over them.

    Raises:
        ValueError: tensors whose shapes do not match, positions out of order, or segments that do
            not cover the prompt.

    Example:
        >>> result = clrp.attribute(model, case.prompt, objective)
        >>> result.resid.shape == (len(result.sites), len(result.str_tokens))
        True
        >>> result.top(3).columns.tolist()
        ['pos', 'token', 'id', 'relevance', 'share', 'special']
    """

    tokens: Float[Tensor, " pos"]
    resid: Float[Tensor, "site pos"]
    heads: Float[Tensor, "layer head pos"]
    neurons: Float[Tensor, "layer pos d_mlp"] | None
    token_ids: Int[Tensor, " pos"]
    special: Bool[Tensor, " pos"]
    str_tokens: tuple[str, ...]
    sites: tuple[str, ...]
    delta: float
    target_logit: float
    contrast_logit: float | None
    objective: str
    target: str
    contrast: str
    rules: str
    coverage: Coverage
    ledger: Ledger
    model_name: str
    pos: int
    target_is_top: bool
    memory: str = "plain"
    prepended_bos: bool | None = None
    earlier_pos: tuple[int, ...] = ()
    attention: str = "eager"
    answer: AnswerRelevance | None = None
    segments: tuple[Segment, ...] = ()

    def __post_init__(self) -> None:
        pos = len(self.str_tokens)
        check_segments(self.segments, pos)
        check_earlier("pos", self.pos, "earlier_pos", self.earlier_pos)
        shapes = {
            "tokens": (pos,),
            "resid": (len(self.sites), pos),
            "heads": (*self.heads.shape[:2], pos),
            "token_ids": (pos,),
            "special": (pos,),
        }
        for name, shape in shapes.items():
            given = tuple(getattr(self, name).shape)
            if given != shape:
                raise ValueError(f"Attribution.{name} has shape {given}, not {shape}.")
        if self.neurons is not None and tuple(self.neurons.shape[:2]) != (self.heads.shape[0], pos):
            raise ValueError(f"Attribution.neurons has shape {tuple(self.neurons.shape)}.")

    @property
    def positions(self) -> tuple[int, ...]:
        """Every position explained, in rising order.

        Example:
            >>> result.positions == (len(result.str_tokens) - 1,)  # the last token by default
            True
        """
        return (*self.earlier_pos, self.pos)

    @property
    def greyed(self) -> Bool[Tensor, " pos"]:
        """Special tokens and the first token, which pictures show grey and leave out of the scale.

        Example:
            >>> bool(result.greyed[0])
            True
        """
        greyed = self.special.clone()
        greyed[0] = True
        return greyed

    @property
    def sink_share(self) -> float:
        """The share of Δℓ at the first token and at special tokens (NaN where Δℓ is 0).

        Attention heads with nothing to do look there, so this relevance says little about the
        prompt: the "BOS bias" of arXiv:2604.17761.

        Example:
            >>> beside = float(result.tokens.double()[~result.greyed].sum()) / result.delta
            >>> abs(result.sink_share + beside - result.ledger.share_to_tokens) < 1e-4
            True
        """
        sinks = float(self.tokens.double()[self.greyed].sum())
        return sinks / self.delta if self.delta else float("nan")

    def to_frame(self) -> pd.DataFrame:
        """The input tokens as a table, in the order of the prompt.

        Returns:
            Columns pos, token, id, relevance (in logits), share (of Δℓ) and special.

        Example:
            >>> bool(abs(result.to_frame()["relevance"].sum() - float(result.tokens.sum())) < 1e-4)
            True
        """
        import pandas as pd

        return pd.DataFrame(
            {
                "pos": range(len(self.str_tokens)),
                "token": self.str_tokens,
                "id": self.token_ids.numpy(),
                "relevance": self.tokens.numpy(),
                "share": self.tokens.numpy() / (self.delta or float("nan")),
                "special": self.special.numpy(),
            }
        )

    def top(self, k: int = 10) -> pd.DataFrame:
        """The ``k`` input tokens of largest |relevance|, with the columns of ``to_frame``.

        Args:
            k: Number of tokens.

        Example:
            >>> len(result.top(5))
            5
        """
        frame = self.to_frame()
        order = frame["relevance"].abs().sort_values(ascending=False, kind="stable").index
        return frame.loc[order[:k]].reset_index(drop=True)

    def by(self, how: How, *, normalize: Literal["logits", "largest"] = "logits") -> pd.DataFrame:
        """Sum the input tokens' relevance over segments of the prompt.

        The segments cover the prompt in order, so nothing is lost: tokens that belong to none of
        those asked for are in rows named "template" (what a chat template writes) or "rest". Sums
        are taken in float64. A token belongs to the segment in which its first character that is
        not white space lies.

        Args:
            how: "message": the messages of a prompt that ``chat`` made, and the template's text
                between them. "tool": its tool calls and tool results. "sentence", "line", "word":
                by punctuation, line breaks or word characters, never across messages; a word puts
                together the tokens, and parts of characters, that it is made of. A dict {name:
                (start, end)}: positions of tokens, ``end`` not included. A list of texts, each
                exactly once in the prompt.
            normalize: "logits", or "largest": divided by the largest |relevance| of a token that
                is not special, as in arXiv:2604.17761.

        Returns:
            A row for each segment, in the order of the prompt. Columns segment (its name), role
            (of its message), kind (as ``Segment.kind``), start and stop (positions of its first
            token and behind its last), n_tokens, relevance, share (of Δℓ), positive and negative
            (the sums of positive and of negative relevance), and largest_token (the text of its
            token of largest |relevance|).

        Raises:
            ValueError: An unknown ``how`` or ``normalize``, segments that overlap, a range outside
                the prompt, a text that is not in the prompt exactly once; or "largest" where no
                token that is not special has relevance.
            PromptError: "message" or "tool" for a prompt without messages or without tools.

        Example:
            >>> lines = result.by("line")
            >>> bool(abs(lines["relevance"].sum() - float(result.tokens.double().sum())) < 1e-9)
            True
            >>> result.by({"beginning": (0, 5)})["segment"].tolist()
            ['beginning', 'rest']
        """
        from ..inputs.segment_sums import segment_frame

        return segment_frame(self, how, normalize)

    def check(
        self,
        model: Any,
        k: int = 16,
        n_random: int = 16,
        *,
        objective: Callable[[Tensor], Tensor] | None = None,
        by: How | None = None,
        replace: Replace = "zero",
        seed: int = 0,
        window: int | None = 2,
        batch_size: int = 16,
        progress: bool = True,
    ) -> MapCheck:
        """Measure what the strongest tokens of this map do to Δℓ, and give a verdict on the map.

        The k ordinary tokens of largest |relevance|, and some random others, are replaced, each in
        a run of the model of its own; what replacing any other token would do is predicted
        (``token_effects``). Ordinary tokens are those that are not special, not the first one
        (``greyed``) and not after the explained position. The verdict says whether the tokens that
        the map names have much of the effect that so many tokens can have, in the direction that it
        says. It costs about 8 forwards and a backward, and (k + n_random) forwards, each only from
        the replaced token on.

        Args:
            model: The ``TransformerBridge`` that was explained, in evaluation mode, without hooks
                of yours (with ``window=None`` it may have the same as when it was explained).
            k: How many of the strongest tokens are replaced; all, if there are fewer.
            n_random: How many random other ones are replaced; 0 for none.
            objective: What was explained. Needed, unless it was the difference of two single
                tokens; two answers (``answer_diff``) need it too.
            by: Check segments instead of tokens, as for ``by``. All ordinary tokens of a segment
                are replaced together; its relevance is their sum, and its predicted effect only the
                sum of their single effects.
            replace: What replaces tokens, as for ``token_effects``: "zero", "random", a token id,
                or one for each position.
            seed: Of the random tokens: which are replaced, and by what with ``replace="random"``.
            window: As for ``token_effects``; None replaces every token in a run of its own.
            batch_size: Runs in a batch.
            progress: Show progress bars.

        Returns:
            A ``MapCheck``: relevance beside predicted and measured effects, the figures and the
            verdict.

        Raises:
            TypeError: ``model`` is not a bridge, or ``objective`` is not a function.
            ValueError: ``k``, ``n_random``, ``seed``, ``window``, ``batch_size`` or ``replace`` out
                of range; ``by`` as for ``by``.
            TokenError: the objective cannot be made again from the result's words, or another one
                is given.
            PromptError: no token is ordinary, or the tokens are not this model's.
            ModelStateError: another model, or another objective, than was explained: Δℓ differs by
                more than rounding explains (``attribution/check/question.py`` states how much); or
                as ``token_effects``.
            NonFiniteError: relevance or an effect is NaN or infinite.
            UncoveredComponentError: effects cannot be predicted in this model; use ``window=None``.

        Example:
            >>> check = result.check(model, k=8, n_random=8, progress=False)
            >>> print(check.sentence)
            supported: the 8 strongest tokens hold ... % of the effect that 8 tokens can have, ...
            >>> by_hand = clrp.token_effects(
            ...     model, case.prompt, objective, window=None, progress=False
            ... )
            >>> bool((check.measured - by_hand.effect[check.measured_at]).abs().max() < 1e-3)
            True
        """
        from .check.run import check_map

        return check_map(
            model, self, k, n_random, objective, by, replace, seed, window, batch_size, progress
        )

    def __repr__(self) -> str:
        return (
            f"Attribution({self.model_name}, {len(self.str_tokens)} tokens, "
            f"{self.target!r} vs {self.contrast!r}, Δℓ={self.delta:+.4f}, rules={self.rules!r}, "
            f"{self.ledger.share_to_tokens:.0%} of Δℓ at the input tokens)"
        )

    # ------------------------------------------------------------ pictures

    def show(self, *, include_special: bool = False) -> RenderedHTML:
        """Show the prompt's tokens coloured by relevance, with circuitsvis, without network.

        In prompts of more than 1,000 tokens, runs of faint tokens are folded and open with a click.
        Where two answers were explained, the tokens of theirs that the model read follow the
        prompt, marked ``[target]`` and ``[contrast]``.

        Args:
            include_special: Colour special tokens and the first token too, and let them count in
                the colour scale.

        Example:
            >>> picture = result.show()  # as the last value of a notebook cell, it is displayed
            >>> result.str_tokens[5].strip() in str(picture)
            True
        """
        from ..render import colored_tokens

        shown = with_answers(self)
        return colored_tokens(shown.str_tokens, shown.tokens, **shown._look(include_special))

    def show_layers(self, *, include_special: bool = False) -> RenderedHTML:
        """Show the tokens coloured by the relevance of their hidden states at a selectable site.

        Args:
            include_special: As for ``show``.

        Example:
            >>> result.sites[0] in str(result.show_layers())
            True
        """
        from ..render import colored_tokens_by_site

        shown = with_answers(self)
        look = shown._look(include_special)
        return colored_tokens_by_site(shown.str_tokens, shown.resid, shown.sites, **look)

    def show_by(self, how: How, *, include_special: bool = False) -> RenderedHTML:
        """Show the prompt's text with each segment in the colour of its relevance.

        Args:
            how: The segments, as for ``by``.
            include_special: Colour what a chat template writes too, and let it count in the colour
                scale.

        Raises:
            ValueError: as ``by``.
            PromptError: as ``by``.

        Example:
            >>> picture = result.show_by("line")
            >>> result.str_tokens[5].strip() in str(picture)
            True
        """
        from ..render import colored_tokens

        frame = self.by(how)
        ends = zip(frame["start"], frame["stop"], strict=True)
        texts = ["".join(self.str_tokens[start:stop]) for start, stop in ends]
        written = torch.tensor((frame["kind"] == "template").to_numpy())
        look = self._look(include_special)
        if not include_special:
            look["greyed"] = written
        return colored_tokens(texts, torch.tensor(frame["relevance"].to_numpy()), **look)

    def _look(self, include_special: bool) -> dict[str, Any]:
        return {
            "greyed": None if include_special else self.greyed,
            "target": self.target or "the target",
            "contrast": self.contrast or "its alternatives",
        }

    def save_html(
        self,
        path: str | Path,
        *,
        candidates: pd.DataFrame | None = None,
        check: MapCheck | None = None,
    ) -> Path:
        """Write a report as one HTML file, which opens from disk without network.

        Args:
            path: Where to write; the folder must exist.
            candidates: Rows of ``next_token_table`` to include.
            check: What ``check`` found for this result: its verdict, and the measured effects
                beside relevance.

        Returns:
            The path.

        Raises:
            ValueError: a relevance is NaN or infinite, or ``check`` is of another result.
            OSError: the file cannot be written.

        Example:
            >>> result.save_html("report.html").name
            'report.html'
        """
        from ..render import save_html

        return save_html(path, report_of(self, candidates=candidates, check=check))

    # ------------------------------------------------------------ files

    def save(self, path: str | Path) -> Path:
        """Write the result to a safetensors file, which ``load`` reads back exactly.

        Args:
            path: Where to write; the folder must exist.

        Returns:
            The path.

        Raises:
            OSError: the file cannot be written.

        Example:
            >>> path = result.save("result.safetensors")
            >>> clrp.Attribution.load(path).delta == result.delta
            True
        """
        tensors: dict[str, Tensor | None] = {name: getattr(self, name) for name in _TENSORS}
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _TENSORS}
        if self.prepended_bos is None:
            del rest["prepended_bos"]  # early files do not have this field
        rest |= {"coverage": asdict(self.coverage), "ledger": asdict(self.ledger)}
        if self.answer is None:
            del rest["answer"]  # early files do not have this field
        else:
            tensors |= tensors_of(self.answer)
            rest["answer"] = facts_of(self.answer)
        if self.attention == "eager":  # as version 0.1 writes and reads it
            del rest["attention"]
        if not self.earlier_pos:  # as version 0.1 writes and reads it
            del rest["earlier_pos"]
        rest["segments"] = [asdict(segment) for segment in self.segments]
        if not self.segments:  # as version 0.1 writes and reads it
            del rest["segments"]
        return write_result(path, _FILE, tensors, rest)

    @classmethod
    def load(cls, path: str | Path) -> Attribution:
        """Read a file that ``save`` wrote.

        Args:
            path: The file.

        Raises:
            FileNotFoundError: there is no such file.
            FileFormatError: the file is damaged, of another kind, or of another version.

        Example:
            >>> path = result.save("result.safetensors")
            >>> bool((clrp.Attribution.load(path).tokens == result.tokens).all())
            True
        """
        tensors, data = read_result(path, _FILE)
        with rebuilding_from(path):
            rows = tuple(LedgerRow(**row) for row in data["ledger"]["rows"])
            data["ledger"] = Ledger(rows, data["ledger"]["delta"])
            data["coverage"] = coverage_from(data["coverage"])
            if "answer" in data:
                data["answer"] = answer_from(tensors, data["answer"])
            data["segments"] = [Segment(**one) for one in data.get("segments", ())]
            data = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
            return cls(**data, **{name: tensors.get(name) for name in _TENSORS})  # type: ignore[arg-type]


def with_answers(result: Attribution) -> Attribution:
    """The result with the answers' tokens as further positions, for pictures.

    After the prompt come the tokens of the target that the model read and then those of the
    contrast, all marked. A result without answers stays as it is.
    """
    answer = result.answer
    if answer is None:
        return result
    texts = [
        labelled(side, getattr(answer, side).str_tokens[: getattr(answer, side).n_read])
        for side in SIDES
    ]
    length, more = len(result.str_tokens), sum(map(len, texts))
    segments = result.segments
    for side, marked in zip(SIDES, texts, strict=True):
        segments = with_answer(segments, f"{side} answer", marked)
    parts: dict[str, Any] = {
        name: torch.cat([getattr(result, name), read_part(answer, name)], dim=-1)
        for name in ("tokens", "resid", "heads", "token_ids", "special")
    }
    return replace(
        result,
        **parts,
        neurons=None,
        str_tokens=(*result.str_tokens, *texts[0], *texts[1]),
        segments=segments,
        pos=length - 1 + more,
        earlier_pos=tuple(range(length - 1, length - 1 + more)),
        answer=None,
    )


def _answers_note(result: Attribution) -> str:
    shown = with_answers(result)
    more = len(shown.str_tokens) - len(result.str_tokens)
    if not more:
        return "Of the answers, the model read no token: one token of each was explained."
    return (
        f"The last {more} tokens are those of the answers that the model read, marked [target] and "
        "[contrast]; the last token of an answer is only predicted."
    )


def report_of(
    result: Attribution,
    candidates: pd.DataFrame | None = None,
    graph: AttributionGraph | None = None,
    check: MapCheck | None = None,
    **fields: Any,
) -> str:
    """Render the report of one explained prediction as an HTML page that fetches nothing.

    Args:
        result: What to show.
        candidates: Rows of ``next_token_table`` at the explained position.
        graph: The pruned attribution graph of the same prediction, for a section of its own.
        check: The check of the same result, for a verdict and measured effects.
        **fields: Fields of ``render.report.Report`` that differ from the result's, such as
            ``model_name`` or ``notes``.

    Raises:
        NonFiniteError: a relevance is NaN or infinite.
        ValueError: the check is of another result.
        TypeError: a field that ``Report`` does not have.
    """
    notes = () if result.answer is None else (_answers_note(result),)
    checked: dict[str, Any] = {}
    if check is not None:
        from .check.shown import report_fields

        checked = report_fields(check, result, len(with_answers(result).str_tokens))
    result = with_answers(result)
    report = Report(
        title=_title(result),
        model_name=result.model_name,
        rules=result.rules,
        objective=result.objective,
        str_tokens=result.str_tokens,
        token_ids=result.token_ids.tolist(),
        tokens=result.tokens,
        delta=result.delta,
        target=(result.target,) if result.target else (),
        contrast=(result.contrast,) if result.contrast else (),
        target_logit=result.target_logit,
        contrast_logit=result.contrast_logit,
        quantity=_quantity(result),
        target_is_top=result.target_is_top,
        greyed=result.greyed,
        position=in_words(result.positions) if result.earlier_pos else result.pos,
        resid=result.resid,
        site_labels=result.sites,
        heads=result.heads,
        candidates=None if candidates is None else _typable(_rows(candidates)),
        ledger=_rows(result.ledger.to_frame()),
        coverage=[vars(row) for row in result.coverage.summary()],
        graph=None if graph is None else view_of(graph),
        notes=notes,
        messages=_messages(result),
        message_starts=[(s.start, s.name) for s in result.segments if s.n_tokens],
        **checked,
    )
    return report_html(dataclasses.replace(report, **fields))


def _messages(result: Attribution) -> list[dict[str, Any]]:
    """Rows for the messages of a chat, without the pieces of the template that have no tokens."""
    if not result.segments:
        return []
    rows = zip(result.by("message").to_dict("records"), result.segments, strict=True)
    return [
        {
            "message": row["segment"],
            "begins": " ".join(segment.text.split())[:_PREVIEW],
            "tokens": row["n_tokens"],
            "relevance": row["relevance"],
            "share": row["share"],
            "token": row["largest_token"],
        }
        for row, segment in rows
        if segment.kind != "template" or segment.n_tokens
    ]


def _rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(k): v for k, v in row.items()} for row in frame.to_dict("records")]


def _typable(candidates: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, with token names that can be read on the page and typed."""
    return [
        row | {"token": printed(str(row["token"]), int(row["id"]))}
        if {"token", "id"} <= row.keys()
        else row
        for row in candidates
    ]


def _quantity(result: Attribution) -> str:
    """What the objective's two terms are; a file has this in the objective's words only."""
    quantity = "log-probability" if result.objective.startswith(LOGPROB) else "logit"
    return f"summed {quantity}" if result.earlier_pos else quantity


def _title(result: Attribution) -> str:
    if not result.target:
        return f"Relevance of {'several predictions' if result.earlier_pos else 'one prediction'}"
    contrast = f" and not «{visible(result.contrast)}»" if result.contrast else ""
    return f"Why «{visible(result.target)}»{contrast}?"
