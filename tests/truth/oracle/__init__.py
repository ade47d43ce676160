"""Independent truth for the tests: relevance propagated operation by operation.

Plain torch, written from the mathematics and from the Hugging Face configuration and state dict
alone. No automatic differentiation, no TransformerLens, nothing of the package under test.

    result = propagate(hf_model, tokens, contrast_seed(tokens, target, contrast, vocab), "attnlrp")
    result.relevance["blocks.0.attn.hook_z"]        # [batch, pos, head, d_head]
"""

from .read import read_model
from .result import OracleResult, contrast_seed, propagate
from .rules import RULE_SETS, Rules

__all__ = ["RULE_SETS", "OracleResult", "Rules", "contrast_seed", "propagate", "read_model"]
