"""Checks that users run on their own model: is its relevance right?"""
