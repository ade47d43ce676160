"""From a question to a graph: the plan, the plain and the tiled way, and attribution_graph."""
