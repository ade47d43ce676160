"""The small vocabulary of the benchmark."""

# ruff: noqa: SIM905 (a list of words reads best as a sentence)
from __future__ import annotations

NAMES = tuple(
    "Ann Ben Tom Eva Leo Mia Sam Zoe Kim Max Ivy Dan Amy Joe Lea Ray Sue Ted Una Vic".split()
)
THINGS = tuple("apples books cards coins eggs pens shells stamps toys cups keys nuts".split())
NOUNS = tuple(
    "apple river stone lamp cloud bread chair horse light music night ocean paper queen radio "
    "sugar table train water green house mouse plant tiger bird fish gold moon rain snow".split()
)
CLOSERS = tuple("Done Sure Okay Hello Ready Thanks Bye Yes".split())
BULLETS = ("-", "*", "+", "#", ">")
JOINERS = (";", "/", "|", "&", "=")
COUNTS = ("zero", "one", "two", "three", "four", "five", "six")
VARIABLES = tuple(
    "width height color size price count total name speed weight depth length rate score level "
    "index value limit offset label".split()
)
FUNCTIONS = tuple("run make build load update check start find".split())
CLASSES = tuple("Box Car Item User Shape Order Page Node".split())
FIELDS = tuple("room desk phone badge seat shelf".split())
APPS = tuple("contacts calendar notes mail office chat".split())
TOOLS = {"Send": "send", "Tell": "tell", "Call": "call", "Book": "book"}
