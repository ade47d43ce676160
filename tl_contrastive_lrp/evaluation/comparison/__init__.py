"""Agreement of estimated effects with measured ones: correlation, overlap and differences."""
