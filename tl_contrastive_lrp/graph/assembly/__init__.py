"""Assembles a graph: the plan, the plain and the tiled assembly, and ``attribution_graph``."""
