"""The frozen result of ``Attribution.check``, and its file format."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...files import FileKind, read_result, rebuilding_from, write_result
from . import statistics as figures
from .verdict import Verdict, in_a_sentence, verdict_of

if TYPE_CHECKING:
    import pandas as pd

_FILE = FileKind("tl_contrastive_lrp.map_check", 1, "the check of a map")
_TENSORS = (
    "relevance", "predicted", "measured", "measured_at", "strongest", "drawn", "ordinary",
    "starts", "stops",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class MapCheck:
    """Whether what a relevance map names has the effect that it says, with a verdict.

    The k tokens of largest |relevance| and some random others were replaced in runs of the model,
    one at a time; the effects of all tokens were predicted. An effect is Δℓ with the token replaced
    minus Δℓ, in logits, so that a token of positive relevance should have a negative effect. The
    verdict is about single tokens taken away, not about the answer's cause, and not about tokens
    that the map does not name. "Units" are tokens, or segments if the map was checked by segments.

    Attributes:
        relevance: Relevance of each unit, in logits; of a segment, the sum over its ordinary
            tokens.
        predicted: The predicted effect of replacing each unit; of a segment only the sum of its
            ordinary tokens' single effects.
        measured: Measured effects; of a segment, with all its ordinary tokens replaced together.
        measured_at: The units that these are of, in the order of the prompt.
        strongest: The ordinary units of largest |relevance|, strongest first.
        drawn: The random ones, in the order of the prompt.
        ordinary: Which units count: those with a token that is not special, not the first one, and
            not after the explained position.
        starts: Position of the first token of each unit.
        stops: Position behind its last token.
        names: The tokens' texts, or the segments' names.
        unit: "token" or "segment".
        k: How many of the strongest were asked for; there may be fewer.
        n_random: How many random ones were asked for; there may be fewer.
        seed: Of what was drawn.
        window: As for ``token_effects``; None where every token was measured.
        replaced_with: What replaced the tokens, in words.
        delta: Δℓ.
        objective: The objective in words, with its sign.
        target: Name of the target token(s).
        contrast: Name of what it is contrasted with, "" for none.
        rules: Name of the rule set of the map.
        model_name: As TransformerLens calls the model.
        share_to_tokens: The signed share of Δℓ that the map gives to the input tokens; None where
            Δℓ is 0.
        sink_share: The share at the first token and at special tokens; None where Δℓ is 0.
        saturation: The largest weight of a head's attention pattern at the last explained position,
            averaged over the heads of all layers, from 0 to 1. Where patterns are nearly one-hot,
            the softmax hardly changes with its scores, and relevance says little about what would
            attract attention instead. None where no ``hook_pattern`` shows it.
        forwards: What the check cost, in forwards of the prompt, without the backward of the
            prediction.
        seconds: How long it took.

    Raises:
        ValueError: tensors that do not match, are not finite, or name units that do not exist.

    Example:
        >>> check = result.check(model, k=5, n_random=3, progress=False)
        >>> len(check.measured), check.verdict in ("supported", "weak", "contradicted")
        (8, True)
        >>> check.to_frame().columns.tolist()
        ['pos', 'token', 'relevance', 'predicted', 'measured', 'chosen', 'ordinary']
    """

    relevance: Float[Tensor, " unit"]
    predicted: Float[Tensor, " unit"]
    measured: Float[Tensor, " measured"]
    measured_at: Int[Tensor, " measured"]
    strongest: Int[Tensor, " strongest"]
    drawn: Int[Tensor, " drawn"]
    ordinary: Bool[Tensor, " unit"]
    starts: Int[Tensor, " unit"]
    stops: Int[Tensor, " unit"]
    names: tuple[str, ...]
    unit: str
    k: int
    n_random: int
    seed: int
    window: int | None
    replaced_with: str
    delta: float
    objective: str
    target: str
    contrast: str
    rules: str
    model_name: str
    share_to_tokens: float | None
    sink_share: float | None
    saturation: float | None
    forwards: float
    seconds: float

    def __post_init__(self) -> None:
        count = len(self.names)
        for name in ("relevance", "predicted", "ordinary", "starts", "stops"):
            if tuple(getattr(self, name).shape) != (count,):
                raise ValueError(f"MapCheck.{name} is not of {count} {self.unit}s.")
        if len(self.measured) != len(self.measured_at):
            raise ValueError("MapCheck.measured and MapCheck.measured_at have different lengths.")
        for name in ("relevance", "predicted", "measured"):
            if not bool(getattr(self, name).isfinite().all()):
                raise ValueError(f"MapCheck.{name} has values that are NaN or infinite.")
        chosen = torch.cat([self.strongest, self.drawn])
        if not len(self.strongest) or not torch.equal(chosen.sort().values, self.measured_at):
            raise ValueError("MapCheck.measured_at are not the strongest and the random units.")
        inside = (chosen >= 0) & (chosen < count)
        if not bool(inside.all()) or not bool(self.ordinary[chosen].all()):
            raise ValueError("MapCheck: what is measured must be ordinary units.")
        if len(set(chosen.tolist())) != len(chosen):
            raise ValueError("MapCheck: a unit is measured twice.")
        if self.unit not in ("token", "segment"):
            raise ValueError(f"MapCheck.unit={self.unit!r} must be 'token' or 'segment'.")

    # ------------------------------------------------------------ the verdict

    @property
    def verdict(self) -> Verdict:
        """Whether the measured effects support the map: "supported", "weak" or "contradicted".

        It follows from ``captured`` by two thresholds. "weak" is also the verdict where nothing can
        be said, because Δℓ or all effects are 0.

        Example:
            >>> result.check(model, progress=False).verdict
            'supported'
        """
        return verdict_of(self.captured)

    @property
    def sentence(self) -> str:
        """The verdict and its reason in one sentence.

        Example:
            >>> check = result.check(model, k=5, progress=False)
            >>> check.sentence.startswith(f"{check.verdict}: the 5 strongest tokens hold ")
            True
        """
        return in_a_sentence(self.captured, len(self.strongest), self.unit, self.delta)

    @property
    def cost(self) -> str:
        """What the check cost, in words.

        Example:
            >>> result.check(model, k=5, n_random=3, progress=False).cost
            '8 tokens replaced, ... forwards of the prompt and a backward, ... s'
        """
        backward = "" if self.window is None else " and a backward"
        return (
            f"{len(self.measured)} {self.unit}{'s' * (len(self.measured) != 1)} replaced, "
            f"{self.forwards:.1f} forwards of the prompt{backward}, {self.seconds:.1f} s"
        )

    # ------------------------------------------------------------ the figures

    @cached_property
    def best(self) -> Float[Tensor, " unit"]:
        """The measured effect of each unit where there is one, else the predicted one, in logits.

        Example:
            >>> check = result.check(model, progress=False)
            >>> torch.equal(check.best[check.measured_at], check.measured)
            True
        """
        return self.predicted.index_copy(0, self.measured_at, self.measured)

    @cached_property
    def captured(self) -> float | None:
        """The share of the effect that k units can have which lies at those that the map names.

        Σ −sign(relevance) · measured effect over the strongest, divided by the sum of as many
        largest |effect| over ordinary units (``best``). From -1 to 1: 1 if the map names the units
        of largest effect, each with the right sign; negative if their signs are wrong. None where
        Δℓ or all effects are 0.

        Example:
            >>> -1 <= result.check(model, progress=False).captured <= 1
            True
        """
        if self.delta == 0:
            return None
        return figures.captured(
            self.relevance[self.strongest], self.best[self.strongest], self.best[self.ordinary]
        )

    @cached_property
    def agreement(self) -> float | None:
        """Pearson's correlation of −relevance and effects (``best``) over ordinary units.

        None where one of the two does not vary.

        Example:
            >>> -1 <= result.check(model, progress=False).agreement <= 1
            True
        """
        return figures.pearson(-self.relevance[self.ordinary], self.best[self.ordinary])

    @cached_property
    def sign_agreement(self) -> float | None:
        """The share of the strongest units' Σ|measured effect| whose sign is as relevance says.

        None where they have no effect.

        Example:
            >>> 0 <= result.check(model, progress=False).sign_agreement <= 1
            True
        """
        return figures.sign_agreement(self.relevance[self.strongest], self.best[self.strongest])

    @cached_property
    def contrast_to_random(self) -> float | None:
        """Mean |measured effect| of the strongest units over that of the random ones.

        None where no random unit was measured, or they have no effect.

        Example:
            >>> result.check(model, progress=False).contrast_to_random > 1
            True
        """
        return figures.contrast_to_random(self.best[self.strongest], self.best[self.drawn])

    @cached_property
    def predicted_agreement(self) -> float | None:
        """Pearson's correlation of predicted and measured effects over the measured units.

        How far predictions can be relied on here. None where one of the two does not vary.

        Example:
            >>> result.check(model, window=None, progress=False).predicted_agreement
            1.0
        """
        return figures.pearson(self.predicted[self.measured_at], self.measured)

    @property
    def statistics(self) -> dict[str, float | None]:
        """All figures by name, for tables; None where one is not defined.

        Example:
            >>> list(result.check(model, progress=False).statistics)[:3]
            ['captured', 'agreement', 'sign_agreement']
        """
        names = (
            "captured", "agreement", "sign_agreement", "contrast_to_random",
            "predicted_agreement", "share_to_tokens", "sink_share", "saturation",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def to_frame(self) -> pd.DataFrame:
        """Relevance beside predicted and measured effects, in the order of the prompt.

        Returns:
            For tokens, the columns pos, token, relevance, predicted, measured, chosen and ordinary;
            for segments, segment, start, stop, n_tokens in place of pos and token. ``measured`` is
            NaN for what was not replaced in a run; ``chosen`` is "strongest", "random" or "".

        Example:
            >>> frame = result.check(model, k=5, n_random=3, progress=False).to_frame()
            >>> frame["chosen"].value_counts()[["strongest", "random"]].tolist()
            [5, 3]
        """
        import pandas as pd

        count = len(self.names)
        nan = torch.full((count,), torch.nan, dtype=torch.float64)
        kinds = torch.zeros(count, dtype=torch.long)
        kinds[self.strongest], kinds[self.drawn] = 1, 2
        if self.unit == "token":
            first = {"pos": self.starts.numpy(), "token": self.names}
        else:
            sizes = (self.stops - self.starts).numpy()
            ends = {"start": self.starts.numpy(), "stop": self.stops.numpy(), "n_tokens": sizes}
            first = {"segment": self.names, **ends}
        return pd.DataFrame(
            {
                **first,
                "relevance": self.relevance.numpy(),
                "predicted": self.predicted.numpy(),
                "measured": nan.index_copy(0, self.measured_at, self.measured).numpy(),
                "chosen": [("", "strongest", "random")[kind] for kind in kinds.tolist()],
                "ordinary": self.ordinary.numpy(),
            }
        )

    def __repr__(self) -> str:
        return (
            f"MapCheck({self.model_name}, {len(self.names)} {self.unit}s, {self.target!r} vs "
            f"{self.contrast!r}, Δℓ={self.delta:+.4f}, rules={self.rules!r}: {self.sentence} "
            f"{self.cost})"
        )

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
            >>> check = result.check(model, progress=False)
            >>> path = check.save("check.safetensors")
            >>> clrp.MapCheck.load(path).captured == check.captured
            True
        """
        tensors: dict[str, Tensor | None] = {name: getattr(self, name) for name in _TENSORS}
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _TENSORS}
        return write_result(path, _FILE, tensors, rest)

    @classmethod
    def load(cls, path: str | Path) -> MapCheck:
        """Read a file that ``save`` wrote.

        Args:
            path: The file.

        Raises:
            FileNotFoundError: there is no such file.
            FileFormatError: the file is damaged, of another kind, or of another version.

        Example:
            >>> check = result.check(model, progress=False)
            >>> path = check.save("check.safetensors")
            >>> clrp.MapCheck.load(path).sentence == check.sentence
            True
        """
        tensors, data = read_result(path, _FILE)
        with rebuilding_from(path):
            data["names"] = tuple(data["names"])
            return cls(**data, **{name: tensors[name] for name in _TENSORS})  # type: ignore[arg-type]
