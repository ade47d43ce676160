"""The setting of circuits: a model, prompt, objective and reference states that fit a graph."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...errors import PromptError
from ...graph.data import require_tokens
from ...hooks.sites import find_sites
from ...inputs.located import LocatedObjective
from ...inputs.objective import in_words, positions_of, read_rows
from ...inputs.tokens import model_device, to_tokens
from .edge_space import EdgeSpace
from .results import CircuitFaithfulness
from .runs import chunks, reference_states, run_circuits, visible_positions

# Below this share of the largest |Δℓ| among the circuits, the difference between all edges and none
# is too small to divide by: a change of a tenth of |Δℓ| then moves a recovered share by 1.
SMALL_GAP = 0.1

if TYPE_CHECKING:
    from ...graph.graph import AttributionGraph


@dataclass(frozen=True, eq=False)
class CircuitSetting:
    """A model, prompt, objective and reference states, checked against a graph.

    Attributes:
        model: The bridge.
        objective: Maps logits to Δℓ.
        tokens: The graph's prompt.
        references: The state that replaces an ablated one, by site.
        space: All edges that are possible at the prompt.
        ablation: Where the references came from, "corrupted" or "mean".
        positions: The positions that the graph explains.
    """

    model: Any
    objective: Callable[[Tensor], Tensor]
    tokens: Int[Tensor, "1 pos"]
    references: dict[str, Float[Tensor, "pos d_model"]]
    space: EdgeSpace
    ablation: str
    positions: tuple[int, ...]

    @classmethod
    def of(
        cls,
        model: Any,
        graph: AttributionGraph,
        objective: Callable[[Tensor], Tensor],
        corrupted: str | Tensor | None,
        mean_over: Tensor | None,
        batch_size: int,
        prepend_bos: bool | None = None,
    ) -> CircuitSetting:
        """Check the arguments of ``circuit_faithfulness`` and compute the reference states.

        Raises:
            ValueError: The arguments do not fit the graph, as ``circuit_faithfulness`` says.
            PromptError: A reference prompt has another length.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be 1 or more.")
        if (corrupted is None) == (mean_over is None):
            raise ValueError(
                "Give what replaces ablated states: corrupted=, a prompt of this length in which "
                "the cause is changed, or mean_over=, token ids [prompt, pos] to average over."
            )
        require_tokens(graph, "Running a circuit")
        find_sites(model)
        tokens = to_tokens(model, graph.token_ids.to(model_device(model)))
        reference = corrupted if mean_over is None else mean_over
        assert reference is not None
        if prepend_bos is None and isinstance(reference, str):
            prepend_bos = graph.prepended_bos
        prompts = to_tokens(model, reference, prepend_bos)
        if prompts.shape[1] != tokens.shape[1] or (mean_over is None and len(prompts) != 1):
            raise PromptError(
                f"The reference has shape {list(prompts.shape)} and the graph's prompt "
                f"{tokens.shape[1]} tokens. States are exchanged position by position: give "
                + ("one prompt" if mean_over is None else "prompts")
                + " of the same number of tokens."
            )
        visible, logits = visible_positions(model, tokens)
        space = EdgeSpace.of(graph, visible, int(model.cfg.n_heads))
        delta = float(objective(logits))
        if not math.isclose(delta, graph.delta, rel_tol=1e-2, abs_tol=1e-2):
            raise ValueError(
                f"The graph explains Δℓ = {graph.delta:+.4f}, but this model and objective give "
                f"{delta:+.4f} at its prompt. Give the model and the objective it was made with."
            )
        explained = set(graph.final_positions)
        other = sorted(set(positions_of(objective, logits, tokens.shape[1])) - explained)
        if other:
            raise ValueError(
                f"The graph explains position {in_words(graph.final_positions)}, but this "
                f"objective reads the logits at {in_words(other)}. Give the objective that the "
                "graph was made with, or make the graph again."
            )
        states = reference_states(model, prompts, batch_size)
        ablation = "corrupted" if mean_over is None else "mean"
        return cls(model, objective, tokens, states, space, ablation, graph.final_positions)

    def _delta(self, logits: Float[Tensor, "1 pos vocab"]) -> float:
        """Return Δℓ of one circuit's run, in which only explained positions have meaning.

        Raises:
            ValueError: On these logits the objective reads positions that are not explained.
        """
        if not isinstance(self.objective, LocatedObjective):
            read = torch.nonzero(read_rows(self.objective, logits)[0])[:, 0].tolist()
            other = sorted(set(read) - set(self.positions))
            if other:
                raise ValueError(
                    "This objective reads other positions when edges are ablated: the logits at "
                    f"{in_words(other)}, while the graph explains {in_words(self.positions)}. Use "
                    "one whose positions do not depend on the logits (as a maximum's do)."
                )
        return float(self.objective(logits))

    def measure(
        self, keep: Bool[Tensor, "circuit possible"], batch_size: int, progress: bool
    ) -> list[CircuitFaithfulness]:
        """Run each circuit, and those of every edge and of none.

        Warns where both are nearly the same (``SMALL_GAP``): shares of the difference mean little.

        Raises:
            ValueError: Δℓ is the same with every edge and with none.
        """
        from tqdm.auto import tqdm

        none, every = torch.zeros_like(keep[:1]), torch.ones_like(keep[:1])
        circuits = torch.cat([none, every, keep])
        deltas: list[float] = []
        batches = list(chunks(len(circuits), batch_size))
        for batch in tqdm(batches, desc="circuits", leave=False, disable=not progress):
            masks = self.space.masks(circuits[batch.start : batch.stop])
            logits = run_circuits(self.model, self.tokens, self.references, masks)
            deltas += [self._delta(row[None]) for row in logits]
        empty, full = deltas[:2]
        size = max(abs(empty), abs(full))
        if abs(full - empty) <= 1e-5 * max(size, 1e-3):
            raise ValueError(
                f"Δℓ is {full:+.4f} with every edge and {empty:+.4f} with none: the reference "
                "changes nothing, so nothing can be recovered. Corrupt what the answer depends on."
            )
        size = max(map(abs, deltas))
        if abs(full - empty) < SMALL_GAP * size:
            warnings.warn(
                f"Δℓ is {full:+.4f} with every edge and {empty:+.4f} with none, while it reaches "
                f"{size:.4f} in absolute value among these circuits. Recovered shares, CPR and CMD "
                "are divided by this small difference and mean little here. Corrupt what the "
                "answer depends on, or leave this prompt out of averages.",
                stacklevel=4,
            )
        return [
            CircuitFaithfulness(n_kept, self.space.size, delta, full, empty, self.ablation)
            for n_kept, delta in zip(keep.sum(1).tolist(), deltas[2:], strict=True)
        ]
