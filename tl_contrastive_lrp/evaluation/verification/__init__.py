"""Checks of relevance that users run on their own model and prompt."""
