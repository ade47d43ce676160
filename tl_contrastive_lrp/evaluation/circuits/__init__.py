"""A graph run as a circuit: how much of Δℓ the kept edges alone bring about."""
