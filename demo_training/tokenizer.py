"""Train the byte-level BPE tokenizer of the demo model on generated text.

    python -m demo_training.tokenizer --out RUN/tokenizer

Prints how many tokens it has; a few seconds.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .marked import Task, strip
from .tasks import KINDS, stream

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# A word or a number takes the space before it, a number also a `=`; a newline stands alone, so that
# a prefix that ends at a token border is always tokenised as it is inside the longer text.
_PIECES = r" ?[A-Za-z]+|[ =]?[0-9]+|\n| ?[^\sA-Za-z0-9]+| +(?= )|\s"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat_prompt(user: str) -> str:
    """What the chat template makes of one user message."""
    return f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"


def _text(task: Task) -> str:
    return "\n".join(f"{strip(turn.user)[0]}\n{turn.answer_text}" for turn in task.turns)


def train_tokenizer(
    vocab_size: int, seed: int, per_kind: int = 4000, context: int = 1280
) -> PreTrainedTokenizerFast:
    """Train on `per_kind` tasks of the training part of every kind."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [
        _text(task)
        for kind in KINDS
        for task in itertools.islice(
            stream(kind, seed, held_out=False, few=False, max_length=150), per_kind
        )
    ]
    texts += ["user\n", "assistant\n", "system\n"] * per_kind
    # every number up to 99 in every place it can stand
    texts += [f" {i}={i}" for i in range(100)] * (per_kind // 20)
    tokenizer.train_from_iterator(texts, trainer)
    # No BOS: the chat template alone decides how a prompt begins.
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the tokenizer to")
    parser.add_argument("--vocab-size", type=int, default=1280)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--context", type=int, default=1280)
    args = parser.parse_args()
    tokenizer = train_tokenizer(args.vocab_size, args.seed, context=args.context)
    tokenizer.save_pretrained(args.out)
    print(f"{len(tokenizer)} tokens written to {args.out}")


if __name__ == "__main__":
    main()
