"""Pages of a study: the report, the labelling page, and figures as SVG.

Plain data in, HTML or SVG out. Nothing uses the network, and all text is escaped.
"""
