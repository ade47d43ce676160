"""Edges of one transition: in closed form, with or without tiles, or from batched signals."""
