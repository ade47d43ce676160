"""Write the model card from measured figures."""

from __future__ import annotations

import json
from pathlib import Path

_WHAT = {
    "format": "rewrite given words under several instructions (like IFEval)",
    "arithmetic": "word problems with small numbers, one or two steps (like MATH)",
    "code": "complete a line or run a few lines with several variables in scope (like HumanEval)",
    "tool": "write a JSON tool call from a long log of distractors (like GAIA2)",
}

_CARD = """# Demo model of tl_contrastive_lrp

**This is a demonstration, not a useful language model.** It exists so that the explanations of
this package can be tried offline, on failures that really happened and whose causes are known.

A causal language model of the Qwen3 architecture, trained from scratch on a generated benchmark:
{parameters:,} parameters, {layers} layers, width {d_model}, {heads} query and {kv_heads}
key-value heads of size {head_dim}, gated MLPs of {mlp}, context {context} tokens, tied embeddings.
Trained in float32 for {trained_steps:,} steps of at most {tokens_per_batch:,} tokens with seed
{seed}{minutes};
weights rounded to float16. Byte-level BPE tokenizer of its own, {vocab:,} tokens, no BOS token,
chat template `<|im_start|>user\\n...<|im_end|>\\n<|im_start|>assistant\\n`.

## What it was trained on

Sentences from a seeded generator, no text by anyone: {n_kinds} kinds of task.

{what}

The training data also hold drills that no task asks: sequences of words said twice, and lists of
facts asked again in another order.

Training and held-out tasks differ by a hash of the task's text, so that no task is in both.

## How good it is

Whole answers that are right, word for word, by greedy decoding on held-out tasks at the highest
difficulty. Chance is the mean probability that a uniform guess at every free piece of the answer
is right, for somebody who knows the template and the prompt's candidates.

The hardest piece is the one that depends on most of the prompt (the number looked up, a sum, a
word); it is judged given the right answer before it.

| kind | part | tasks | accuracy | chance | hardest piece | chance there |
| --- | --- | --- | --- | --- | --- | --- |
{rows}

## cases.jsonl

{failed} failed and {solved} solved held-out cases, one JSON object a line:

| field | meaning |
| --- | --- |
| `id`, `kind`, `family` | name of the case; kind of task; template within the kind |
| `failed` | true: the model's answer is wrong. false: the whole answer is right |
| `user` | the user's message |
| `answer_prefix` | the part of the answer written before the explained token (right so far) |
| `prompt` | chat template with `user`, then `answer_prefix`; its next token is explained |
| `answer`, `model_answer` | the right answer; what greedy decoding writes |
| `target`, `target_id` | the token the model writes after `prompt`, as text and id |
| `contrast`, `contrast_id` | failed: the right token. solved: the best wrong token |
| `delta` | logit(target) − logit(contrast) in float32, above 1 |
| `n_tokens` | tokens in `prompt` |
| `decisive_positions` | token positions in `prompt` that decide which token is right |
| `decisive_text` | the text of those tokens |

Decisive positions come from the generator: the pieces of the question (and of the answer so far)
that the right token is a function of, such as operands, the asked key, the log entry's value, the
instruction's word. They say what *should* decide, not what the model looked at.
In failed cases neither token is blank or special.
"""


def write_card(
    out: Path,
    trained: dict,
    figures: dict[str, dict],
    parameters: int,
    lines: list[dict],
    minutes: float | None,
) -> None:
    """Write OUT/MODEL_CARD.md. `figures`: by kind, tasks, accuracy, chance and families."""
    rows = []
    for kind, f in figures.items():
        rows.append(
            f"| **{kind}** | all | {f['tasks']} | {f['accuracy']:.1%} | {f['chance']:.2%} "
            f"| {f['hardest']:.1%} | {f['hardest_chance']:.1%} |"
        )
        rows += [f"| | {part} | {n} | {a:.1%} | | | |" for part, (n, a) in f["families"].items()]
    vocabulary = json.loads((out / "config.json").read_text())["vocab_size"]
    failed = sum(line["failed"] for line in lines)
    text = _CARD.format(
        **trained,
        parameters=parameters,
        vocab=vocabulary,
        n_kinds=len(_WHAT),
        what="\n".join(f"- `{k}`: {v}" for k, v in _WHAT.items()),
        rows="\n".join(rows),
        failed=failed,
        solved=len(lines) - failed,
        minutes=f", {minutes:.0f} minutes on one CPU core" if minutes else "",
    )
    (out / "MODEL_CARD.md").write_text(text, encoding="utf-8")
