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

from ...rules.functions import at_least_float32
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
        effect: The predicted change of each objective so far, [objective, pos].
    """

    def __init__(
        self,
        gradients: Mapping[str, Float[Tensor, "objective head pos d_v"]],
        window: int,
        stop: int,
        effect: Float[Tensor, "objective pos"],
    ) -> None:
        self.gradients, self.window, self.stop, self.effect = gradients, window, stop, effect

    def add(self, seen: Seen) -> None:
        """Add what one attention's later positions of one tile contribute.

        Raises:
            UncoveredComponentError: its pattern is not the softmax of its scores.
        """
        n_keys = seen.values.shape[-2]
        scores = at_least_float32(seen.scores)
        level = scores[-1].logsumexp(-1, keepdim=True)
        shares = (scores[..., :n_keys] - level).exp_()  # e, and in the last row p
        pattern = shares[-1]
        slack = _SLACK.get(seen.pattern.dtype, 1e-4)
        if not torch.allclose(pattern, seen.pattern.to(pattern), rtol=slack, atol=slack):
            raise refused(seen.path, "its pattern is not the softmax of its scores.")
        queries = min(pattern.shape[-2], self.stop - seen.start)
        if queries <= 0:
            return
        shares, z = shares[:, :, :queries], at_least_float32(seen.z[:, :queries])
        n_tokens = n_keys - self.window
        if n_tokens <= 0:
            return
        own = slice(seen.start, seen.start + queries)
        totals = self._windowed(shares[:-1] - shares[-1:], n_tokens)
        # What the window leaves of the clean pattern is never negative, whatever rounding says.
        left = (1.0 - self._windowed(shares[-1:].expand_as(shares[:-1]), n_tokens)).clamp_min_(0.0)
        taken = totals + self._windowed(shares[-1:].expand_as(shares[:-1]), n_tokens)
        total = (left + taken).clamp_min_(torch.finfo(left.dtype).eps)
        at = torch.arange(seen.start, seen.start + queries, device=total.device)[:, None]
        later = at > torch.arange(n_tokens, device=total.device) + self.window
        values = at_least_float32(seen.values)
        for which, of_path in enumerate(self.gradients[seen.path]):
            g = at_least_float32(of_path[:, own])
            dots = g @ values.mT  # [row, head, query, key]
            dots -= torch.linalg.vecdot(z, g)[..., None]
            dots *= shares
            changed = self._windowed(dots[:-1] - dots[-1:], n_tokens).div_(total)
            changed.masked_fill_(~later, 0.0)
            self.effect[which, :n_tokens] += changed.sum((0, 1)).to(self.effect)

    def _windowed(
        self, x: Float[Tensor, "offset head query key"], n_tokens: int
    ) -> Float[Tensor, "head query token"]:
        """Sums over the window: of token i, the entries at keys i + o."""
        total = x[0, ..., :n_tokens].clone()
        for o in range(1, self.window + 1):
            total += x[o, ..., o : o + n_tokens]
        return total
