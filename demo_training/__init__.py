"""Scripts that generate the demo benchmark and train the demo model (not part of the wheel)."""
