"""How often the message that decides an answer ranks first by relevance, per rule set.

The table of chats in docs/faithfulness.md, alone: ``_faithfulness_messages.py`` says what is
measured, and ``faithfulness.py`` measures it too.

    python benchmarks/messages.py
    python benchmarks/messages.py --chats 20

Prints the table. Each chat is explained once under each rule set.
"""

from __future__ import annotations

import argparse

import torch
from _faithfulness_messages import measured
from _faithfulness_page import message_table
from _faithfulness_runs import METHODS

import tl_contrastive_lrp as clrp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chats", type=int, default=60, help="of each of the two kinds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(message_table(measured(clrp.load_demo_model(), options.chats, METHODS)))


if __name__ == "__main__":
    main()
