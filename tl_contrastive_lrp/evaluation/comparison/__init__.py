"""Estimated effects held against measured ones: correlation, overlap and where they differ."""
