"""Tables of the operation oracle: rule sets, and what each torch function is, by name."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class OpRules:
    """How each kind of operation passes relevance; see RULES."""

    norm: str  # "constant" denominators, or "gradient"
    activation: str  # "identity" (f(x)/x), or "gradient"
    softcap: str  # "identity", or "gradient"
    gate: str  # elementwise products: "half" each, or "gradient"
    attention: str  # matrix products: "half" each, or "gradient"
    softmax: str  # "gradient", "constant", or "hot" (attention only, temperature 2)


RULES: dict[str, OpRules] = {
    "attnlrp": OpRules("constant", "identity", "identity", "half", "half", "gradient"),
    "cplrp": OpRules("constant", "identity", "identity", "half", "half", "constant"),
    "relp": OpRules("constant", "identity", "identity", "half", "gradient", "gradient"),
    "gim": OpRules("constant", "gradient", "gradient", "half", "half", "hot"),
    "gradient": OpRules(*["gradient"] * 6),
}


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Linear in their computed arguments, whatever the others are.
LINEAR = _names(
    """
    view reshape transpose permute contiguous clone expand expand_as unsqueeze squeeze flatten
    unflatten cat concat concatenate stack split chunk unbind narrow select __getitem__ gather
    index_select
    repeat repeat_interleave roll flip pad movedim swapaxes t masked_fill masked_fill_ where tril
    triu to type type_as float double dropout __setitem__ copy_ scatter index_add index_add_
    scatter_add_ sum mean neg __neg__ add __add__ __radd__ __iadd__ add_ sub __sub__ __rsub__ rsub
    __isub__ sub_ cumsum broadcast_to view_as reshape_as topk zeros_like ones_like empty_like
    full_like new_zeros new_ones new_empty new_full unfold as_strided split_with_sizes scatter_
    view_as_complex view_as_real
    """
)
PRODUCTS = _names("mul __mul__ __rmul__ multiply mul_ __imul__")
MATRIX_PRODUCTS = _names("matmul __matmul__ __rmatmul__ bmm einsum")
QUOTIENTS = _names("div __truediv__ __itruediv__ div_ true_divide")
WEIGHTED = _names("linear conv1d addmm embedding")  # linear if the weights are given
ACTIVATIONS = _names(
    "silu gelu relu relu_ relu6 leaky_relu elu selu mish clamp clamp_ clip clamp_min clamp_max"
)
# Only ever inside denominators and comparisons: ``op_oracle.audit`` finds any other use.
STATISTICS = _names("square var abs pow __pow__")
ROOTS = _names("rsqrt sqrt norm vector_norm std")
CASTS = _names("to type softmax sum mean zeros_like new_zeros")
NARROW = (torch.float32, torch.bfloat16, torch.float16)
