"""A graph run as a circuit: the share of Δℓ that its edges alone recover."""
