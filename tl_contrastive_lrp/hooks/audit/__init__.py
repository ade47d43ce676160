"""The audit: every operation between logits and embeddings is accounted for or reported."""
