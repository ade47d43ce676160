"""What a rule's autograd Function means for the audit: a row that the Function itself carries.

The audit follows the autograd graph from the logits to the embeddings and has to know, of every
custom Function it meets, which inputs its backward sends a gradient to and whether it shares out a
product. A rule says so in its class attribute ``audit``; a Function without one is a finding, and
the model is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RuleNode:
    """What a custom autograd Function means for the walk.

    Attributes:
        follow: Positions of the inputs that its backward sends a gradient to.
        effect: "pass" hands everything on; "halve" announces a product below; "product" is one that
            has its rule inside; "norm" is a norm that has its rule inside; "ordinary" says
            that the next nonlinear node below keeps its ordinary gradient by decision.
    """

    follow: tuple[int, ...]
    effect: Literal["pass", "halve", "product", "norm", "ordinary"] = "pass"
