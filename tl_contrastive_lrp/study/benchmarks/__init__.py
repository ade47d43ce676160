"""Where items and verdicts come from: one file a benchmark."""
