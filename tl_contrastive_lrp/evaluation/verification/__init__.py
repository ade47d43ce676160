"""Checks that a user runs on their own model: is its relevance right here?"""
