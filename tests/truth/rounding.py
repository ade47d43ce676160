"""How far apart rounding alone can take two computations of the same number, on any processor.

u is the unit roundoff of a dtype, half its machine epsilon. Every addition and multiplication
gives the exact result times 1 + δ with |δ| ≤ u, whichever kernel computes it; a fused multiply-add
rounds once where others round twice. A product of n such factors (or their inverses) is within

    γ_n = n·u / (1 − n·u)

of 1, and so a sum of n terms, or an inner product of two vectors of n entries, added up in any
order, with any blocking and number of threads, is off by at most γ_n Σ|terms|: no term meets more
than n roundings. What enters a sum with k roundings of its own makes that γ_(n+k) (Higham,
Accuracy and Stability of Numerical Algorithms, 2nd ed., 2002, Sec. 2.2, 3.1, 4.2). Where terms
cancel, Σ|terms| is the measure and not the sum.

Through a whole network the roundings of each step are as good as independent and do not all point
one way. Then n of them stay within

    exp(λ·√n·u + n·u² / (1 − u)) − 1  ≈  λ·√n·u

of 1 but for a probability of 2·exp(−λ²·(1 − u)² / 2), 3e-8 at λ = 6 (Higham and Mary, A New
Approach to Probabilistic Rounding Error Analysis, SIAM J. Sci. Comput. 41(5), 2019, Thm. 2.4 and
Sec. 3). n counts what a number meets on its longest way through: the lengths of all contractions.

None of these figures is measured. Numbers that should be equal are compared with twice the bound:
each of the two computations may be off.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# What README and docs promise of a whole run, of the largest value of its kind.
PROMISED = {torch.float64: 1e-10, torch.float32: 1e-5}


def unit(dtype: torch.dtype) -> float:
    """Unit roundoff u."""
    return torch.finfo(dtype).eps / 2


def gamma(n: int, dtype: torch.dtype) -> float:
    """γ_n: n roundings that all point the same way, relative to what is rounded."""
    worst = n * unit(dtype)
    assert worst < 1
    return worst / (1 - worst)


def apart(absolute: Tensor | float, n: int, dtype: torch.dtype) -> Any:
    """How far apart two sums of the same terms can be, whose terms meet at most n roundings.

    Args:
        absolute: Σ|terms|, of each sum.
        n: Number of terms, plus the roundings that each term brings.
        dtype: In which they are added up.

    Returns:
        2 γ_n Σ|terms|, in float64 for a tensor.
    """
    bound = 2 * gamma(n, dtype)
    return absolute.detach().double() * bound if isinstance(absolute, Tensor) else absolute * bound


def through(n: int, dtype: torch.dtype) -> float:
    """How far apart two runs of a network can be, of the terms added up in it: 2λ√n·u, λ = 6."""
    u = unit(dtype)
    return 2 * math.expm1(6 * math.sqrt(n) * u + n * u**2 / (1 - u))


# Compatibility mode of a float64 model: TransformerLens folds norms, biases and centring into
# weights partly in float32, which rounds what each of the (tiny) model's two blocks adds up over
# d_model = 24 entries, and stores it; all else is float64, and the same on every processor.
FOLDING = gamma(2 * (24 + 1), torch.float32)


def depth(model: Any, length: int) -> int:
    """Roundings on the longest way forward and back through a bridge's model.

    Args:
        model: The bridge.
        length: Positions of the prompt.
    """
    cfg = model.cfg
    stream, inside = int(cfg.d_model), int(cfg.n_heads * cfg.d_head)
    attention = stream + int(cfg.d_head) + 2 * length + inside  # q; scores; softmax, z; out
    block = 2 * stream + attention + stream + int(cfg.d_mlp) + 2  # norms; in, out; the stream
    return 2 * (int(cfg.n_layers) * block + 2 * stream)  # the last norm, the unembedding


def off_by_terms(found: Tensor, wanted: Tensor, absolute: Tensor, n: int) -> float:
    """The largest difference in units of ``apart``: at most 1 if rounding explains all of it.

    Where no term is anything, nothing may differ.
    """
    difference = (found.detach().double() - wanted.detach().double()).abs()
    bound = apart(absolute, n, found.dtype)
    assert not difference[bound == 0].any()
    return float((difference / bound.clamp_min(torch.finfo(torch.float64).tiny)).max())
