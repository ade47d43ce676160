"""The command line. Nothing here imports torch or TransformerLens before a command needs them."""

from .main import app, main

__all__ = ["app", "main"]
