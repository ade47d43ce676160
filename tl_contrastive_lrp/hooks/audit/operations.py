"""Tables of what each node of an autograd graph does to relevance.

Names are those of autograd's nodes without "Backward" and the trailing number (``MulBackward0`` is
``Mul``); where overloads differ in kind, the number stays (``Div2`` rounds). A name that is in no
table is unknown, and therefore a finding: add an operation to a table only after checking what it
does.

The graph shows which inputs of a node are *computed* (a gradient flows to them); with the
parameters frozen, all others are constants of the model.
"""

from __future__ import annotations

from ...rules.functions import RuleNode


def words(text: str) -> frozenset[str]:
    """Names separated by spaces, as a set."""
    return frozenset(text.split())


# Linear in all computed inputs together: moves, copies, sums and masks with constant conditions.
LINEAR: frozenset[str] = words("""
    Add Sub Rsub Neg Sum Mean Cumsum Nansum Trace
    Alias View UnsafeView ReshapeAlias ReshapeCopy Squeeze Unsqueeze Expand ExpandCopy Transpose T
    Permute Movedim Select Slice Split SplitWithSizes UnsafeSplit UnsafeSplitWithSizes Unbind Stack
    Cat Unfold AsStrided Diagonal Diag DiagEmbed Narrow
    Index IndexSelect IndexAdd IndexCopy IndexPut IndexPutImpl IndexFill Gather Take TakeAlongDim
    Scatter ScatterAdd SelectScatter SliceScatter DiagonalScatter AsStridedScatter MaskedScatter
    MaskedSelect MaskedFill Where Tril Triu Roll Flip Rot90 Repeat RepeatInterleave ConstantPadNd
    Clone Copy ToCopy Contiguous Fill Zero Conj ResolveConj Real Imag ViewAsReal ViewAsComplex
    Complex
    """)
# Maximum, top k and sort: the choice of elements is a constant; their values are linear.
SELECTING: frozenset[str] = words("Topk Sort Max Min Amax Amin Kthvalue")

# Products: positions of the factors. Other positions are added. With one computed factor the
# operation is linear.
PRODUCTS: dict[str, tuple[int, ...]] = {
    "Mul": (0, 1),
    "Mm": (0, 1),
    "Bmm": (0, 1),
    "Mv": (0, 1),
    "Dot": (0, 1),
    "Addmm": (1, 2),
    "Addmv": (1, 2),
    "Addbmm": (1, 2),
    "Baddbmm": (1, 2),
    "Addcmul": (1, 2),
    "Linear": (0, 1),
    "Convolution": (0, 1),
    "GroupedMm": (0, 1),
}
# Products that mix the elements of their computed factor. A halving above one of them belongs to no
# product.
MIXING: frozenset[str] = frozenset(PRODUCTS) - {"Mul", "Addcmul"}
# query·key, softmax and pattern·value in one node, inputs (query, key, value).
FUSED_ATTENTION = "ScaledDotProduct"

# Their ordinary gradient is the rule.
SOFTMAXES: frozenset[str] = frozenset({"Softmax", "SafeSoftmax"})
# Their ordinary gradient is the rule if the result is the weight of another value.
GATES: frozenset[str] = frozenset({"Sigmoid"})

_NORM = (
    "it normalises where no rule holds the denominator constant (the LN-rule belongs to "
    "TransformerLens' norm components)"
)
_ACTIVATION = "it is an activation function without the identity rule"
_ELEMENTWISE = "it is not linear and has no rule"
_FLAT = "its gradient is zero almost everywhere, so relevance would vanish here"

NORMS: frozenset[str] = words("""
    NativeLayerNorm NativeGroupNorm NativeBatchNorm CudnnBatchNorm RmsNorm FusedRmsNorm
    Norm LinalgVectorNorm Rsqrt Sqrt Var Std VarMean StdMean Reciprocal
    """)
ACTIVATIONS: frozenset[str] = words("""
    Silu Gelu Relu Tanh Sigmoid Softplus Elu Celu Selu LeakyRelu PreluKernel Hardswish
    Hardsigmoid Hardtanh Mish LogSigmoid Threshold Glu Softshrink Hardshrink
    """)

# Known to be nonlinear, and why that matters.
NONLINEAR: dict[str, str] = {
    **dict.fromkeys(NORMS, _NORM),
    **dict.fromkeys(ACTIVATIONS, _ACTIVATION),
    **dict.fromkeys(
        words(
            "Pow Exp Exp2 Expm1 Log Log1P Log2 Logsumexp LogSoftmax Abs Clamp ClampMin ClampMax "
            "Maximum Minimum Erf Erfc Sin Cos Atan Prod Cumprod Hypot Sgn Lerp"
        ),
        _ELEMENTWISE,
    ),
    "Div": "it divides by a computed value",
    **dict.fromkeys(words("Div2 Div3 Round Floor Ceil Trunc Sign Fmod Remainder"), _FLAT),
    "NativeDropout": "dropout is on; call model.eval() first",
}

# Custom autograd Functions of other packages, by qualified name. This package's own rules carry
# their row themselves, as the attribute ``audit`` of the Function.
RULES: dict[str, RuleNode] = {
    # From TransformerLens: undoes the scale that some models put on a residual contribution.
    "transformer_lens.model_bridge.generalized_components.base._ScaledHookGradient": RuleNode((0,)),
    # From torch: wraps the inputs and outputs of modules with backward hooks, unchanged.
    "torch.nn.modules._functions.BackwardHookFunction": RuleNode(tuple(range(64))),
}


def rule_node(function: type) -> RuleNode | None:
    """The row of a custom autograd Function, or None if it has none."""
    own = getattr(function, "audit", None)
    if isinstance(own, RuleNode):
        return own
    return RULES.get(f"{function.__module__}.{function.__qualname__}")
