"""Edges of one transition: in closed form, plainly or by tiles, or by batched backward signals."""
