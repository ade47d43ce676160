"""What the positions after the window hear of a replaced token, in closed form.

With the clean pattern p of a query at position j, its output z, and for each position i + o of the
window the changed key k'_o and value v'_o of the replaced token i,

    e_o = p_o · exp(s'_o − s_o)
    z'_j = (z_j − Σ_o p_o v_o + Σ_o e_o v'_o) / (1 − Σ_o p_o + Σ_o e_o)

where s and s' are the clean query's scores with the clean and the changed key, after all that the
component does to scores. So the softmax is exact, and sinks and hidden keys need no words of their
own. What is linear is the rest: the change of Δℓ is taken to be ⟨z'_j − z_j, g_j⟩, with g the
plain gradient of Δℓ at z. Only scalars are needed. With a_o = ⟨v_o, g_j⟩ and c = ⟨z_j, g_j⟩,

    ⟨z'_j − z_j, g_j⟩ = (Σ_o e_o (a'_o − c) − Σ_o p_o (a_o − c)) / (1 − Σ_o p_o + Σ_o e_o)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from .streams import Seen, refused

_SLACK = {torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of a pattern's entries, beside 1e-4


class LaterPositions:
    """Adds up, over layers and later positions, what Δℓ is predicted to change by.

    Attributes:
        gradients: By path of the attention component, the gradients of the objectives at its z,
            [objective, head, pos, d_v].
        window: The number of positions after the replaced token whose streams are known exactly.
        stop: Positions from here on are left out: their streams are known exactly, or nothing reads
            them.
        effects: The predicted change of each objective so far, by position, [pos], on the CPU.
    """

    def __init__(
        self,
        gradients: Mapping[str, Float[Tensor, "objective head pos d_v"]],
        window: int,
        stop: int,
    ) -> None:
        self.gradients, self.window, self.stop = gradients, window, stop
        shapes = [g.shape for g in gradients.values()]
        self.effects = [
            torch.zeros(max(shape[2] for shape in shapes), dtype=torch.float64)
            for _ in range(max(shape[0] for shape in shapes))
        ]

    def add(self, seen: Seen) -> None:
        """Add what one attention's later positions of one tile contribute.

        Raises:
            UncoveredComponentError: its pattern is not the softmax of its scores.
        """
        n_keys = seen.values.shape[-2]
        # What a key with nearly all of a query's attention leaves to others is a small difference.
        wide = torch.float32 if seen.scores.device.type == "mps" else torch.float64
        scores, values = seen.scores.to(wide), seen.values.to(wide)
        level = scores[-1].logsumexp(-1, keepdim=True)
        shares = (scores[..., :n_keys] - level).exp_()  # e, and in the last row p
        slack = _SLACK.get(seen.pattern.dtype, 1e-4)
        if not torch.allclose(shares[-1], seen.pattern.to(wide), rtol=slack, atol=slack):
            raise refused(seen.path, "its pattern is not the softmax of its scores.")
        queries, n_tokens = min(shares.shape[-2], self.stop - seen.start), n_keys - self.window
        if queries <= 0 or n_tokens <= 0:
            return
        shares = shares[:, :, :queries]
        clean, changed = shares[-1:].expand_as(shares[:-1]), shares[:-1]
        # What the window leaves of the clean pattern is never negative, whatever rounding says.
        total = (1.0 - self._windowed(clean, n_tokens)).clamp_min_(0.0)
        total += self._windowed(changed, n_tokens)
        total.clamp_min_(torch.finfo(wide).tiny)
        at = torch.arange(seen.start, seen.start + queries, device=total.device)[:, None]
        later = at > torch.arange(n_tokens, device=total.device) + self.window
        for which, of_path in enumerate(self.gradients[seen.path]):
            g = of_path[:, seen.start : seen.start + queries].to(wide)
            dots = g @ values.mT  # a', and in the last row a: [row, head, query, key]
            dots -= torch.linalg.vecdot(shares[-1], dots[-1])[..., None]  # c
            dots *= shares
            change = self._windowed(dots[:-1] - dots[-1:], n_tokens).div_(total)
            change.masked_fill_(~later, 0.0)
            self.effects[which][:n_tokens] += change.sum((0, 1)).cpu()

    def _windowed(
        self, x: Float[Tensor, "offset head query key"], n_tokens: int
    ) -> Float[Tensor, "head query token"]:
        """Sums over the window: of token i, the entries at keys i + o."""
        total = x[0, ..., :n_tokens].clone()
        for o in range(1, self.window + 1):
            total += x[o, ..., o : o + n_tokens]
        return total
