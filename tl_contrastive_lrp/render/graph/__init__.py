"""The layered picture of a graph, from plain data to one offline page."""
