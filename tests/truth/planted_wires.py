"""How the planted models of ``planted.py`` are wired: their weights, a block at a time.

The residual stream is made of sections: TOK (the letter, one-hot), PREV (the letter before), OUT
(read by the unembedding), MID (read by the MLP), JUNK, and a constant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LETTERS = 12
FIRST = 5  # id of "a"
SECTIONS = ("TOK", "PREV", "OUT", "MID", "JUNK")
CONST = LETTERS * len(SECTIONS)
POS = CONST + 1  # one-hot positions, where the model has learned ones
PLACES = 16
D_MODEL = POS + PLACES + 3
D_HEAD, HEADS = 48, 4
THETA = 1e8  # frequencies 10^(-i/3): the first pairs tell positions, those from 10 hardly turn
CONTENT = slice(10, 10 + LETTERS)
PLACE = 30  # first dimension of a head for learned positions
BACK = 4  # frequencies used to look back
D_MLP = 2 * LETTERS
VALUES = LETTERS // 2  # lookup: letters from here on are values
ASK = LETTERS - 1  # lookup: the letter that asks


def at(name: str) -> slice:
    start = SECTIONS.index(name) * LETTERS
    return slice(start, start + LETTERS)


@dataclass(frozen=True)
class Plan:
    """One planted model: architecture, task and how sharply its heads look."""

    family: str = "llama"
    task: str = "induction"
    norm: bool = True
    mlp: bool = False
    kv_heads: int = HEADS
    noise: float = 0.01
    match: float = 4.5  # score of a matching letter over others
    look: float = 6.0  # score of the right distance over its neighbours
    seed: int = 0

    @property
    def layers(self) -> int:
        return 1 if self.task == "lookup" else 2


PLANS = {
    "lookup-nonorm": Plan(task="lookup", norm=False),
    "lookup": Plan(task="lookup"),
    "lookup-mlp-gqa": Plan(task="lookup", mlp=True, kv_heads=2),
    "induction-nonorm": Plan(norm=False),
    "induction": Plan(),
    "induction-gqa": Plan(kv_heads=2),
    "induction-mlp-gqa": Plan(mlp=True, kv_heads=2),
    "induction-qwen3": Plan(family="qwen3", kv_heads=2),
    "induction-gpt2": Plan(family="gpt2"),
    "induction-saturated": Plan(match=12.0),
}


@dataclass
class Wires:
    """One block's weights, as maps from and to the residual stream."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor

    @classmethod
    def blank(cls, kv_heads: int) -> Wires:
        zeros = torch.zeros
        return cls(
            q=zeros(HEADS, D_HEAD, D_MODEL), k=zeros(kv_heads, D_HEAD, D_MODEL),
            v=zeros(kv_heads, D_HEAD, D_MODEL), o=zeros(D_MODEL, HEADS, D_HEAD),
            gate=zeros(D_MLP, D_MODEL), up=zeros(D_MLP, D_MODEL), down=zeros(D_MODEL, D_MLP),
        )  # fmt: skip

    def add_noise(self, size: float, generator: torch.Generator) -> None:
        for tensor in vars(self).values():
            tensor += size * torch.randn(tensor.shape, generator=generator)


def _frequency(pair: int) -> float:
    return THETA ** (-2 * pair / D_HEAD)


def _look_back(wires: Wires, head: int, distance: int, size: float, learned: bool) -> None:
    """Query of a head that attends ``distance`` positions back; keys are those of every group."""
    if learned:
        for j in range(distance, PLACES):
            wires.q[head, PLACE + j - distance, POS + j] += size
        return
    for pair in range(BACK):
        angle = -distance * _frequency(pair)
        wires.q[head, pair, CONST] += size * math.cos(angle)
        wires.q[head, pair + D_HEAD // 2, CONST] += size * math.sin(angle)


def wired(plan: Plan) -> list[Wires]:
    generator = torch.Generator().manual_seed(plan.seed)
    eye, learned = torch.eye(LETTERS), plan.family == "gpt2"
    groups = HEADS // plan.kv_heads
    root = math.sqrt(D_HEAD)
    # One step off the right distance lowers Σ cos by this much.
    drop = sum(1 - math.cos(_frequency(pair)) for pair in range(BACK))
    look = root * plan.look * (1.0 if learned else 1.0 / drop)
    match = root * plan.match
    if plan.family == "qwen3":  # queries and keys are normalised: only directions count
        look = match = 1.0
    found = []
    for layer in range(plan.layers):
        wires = Wires.blank(plan.kv_heads)
        finds = "TOK" if plan.task == "lookup" or layer == 0 else "PREV"
        for group in range(plan.kv_heads):
            first = group * groups == 0  # the circuit's head is head 0
            content = at(finds) if first else at("TOK")
            wires.k[group, CONTENT, content] = eye
            if plan.family == "qwen3":
                wires.k[group, CONTENT, content] *= 2 * plan.match / (root * plan.look * 1.2)
            if learned:
                for i in range(PLACES):
                    wires.k[group, PLACE + i, POS + i] = 1.0
            else:
                wires.k[group, :BACK, CONST] = 1.0
            wires.v[group, CONTENT, at("TOK")] = eye
        answer = at("MID") if plan.mlp else at("OUT")
        if plan.task == "lookup":
            wires.q[0, 10 + VALUES : 10 + ASK, ASK] = match
            wires.o[answer, 0, CONTENT] = eye
        elif layer == 0:
            _look_back(wires, 0, 1, look, learned)
            wires.o[at("PREV"), 0, CONTENT] = eye
        else:
            wires.q[0, CONTENT, at("TOK")] = match * eye
            wires.o[answer, 0, CONTENT] = eye
        _look_back(wires, 1, 2, look, learned)
        wires.o[at("JUNK"), 1, CONTENT] = eye
        wires.q[2, CONTENT, at("TOK")] = match * eye
        wires.o[at("OUT"), 2, CONTENT] = -0.5 * eye
        _look_back(wires, 3, 3, look, learned)
        wires.o[at("JUNK"), 3, CONTENT] = -eye
        _mlp(wires, plan.mlp and layer == plan.layers - 1)
        wires.add_noise(plan.noise, generator)
        found.append(wires)
    return found


def _mlp(wires: Wires, in_circuit: bool) -> None:
    """Neurons 0 to 11 carry MID to OUT, if asked for; the others write TOK to JUNK."""
    eye = torch.eye(LETTERS)
    if in_circuit:
        wires.gate[:LETTERS, at("MID")] = 4 * eye
        wires.gate[:LETTERS, CONST] = -1.0
        wires.up[:LETTERS, at("MID")] = 2 * eye
        wires.down[at("OUT"), :LETTERS] = eye
    wires.gate[LETTERS:, at("TOK")] = 2 * eye
    wires.up[LETTERS:, at("TOK")] = eye
    wires.down[at("JUNK"), LETTERS:] = eye
