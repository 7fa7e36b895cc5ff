"""The distillation loss at three vocabularies: time and memory, against TRL, Liger and naive code.

Time is judged against the faster of Liger's two chunk sizes, memory against the smaller one.
"""

from __future__ import annotations

import statistics

from suite import limits
from suite.loss_memory import peak_beyond_gradients
from suite.loss_methods import LIGER, METHODS, NAIVE, OURS, TRL, method, problem
from suite.measure import Options, Side, Work, interleave, say, seconds
from suite.rows import Row, compared

SHAPES = ((4096, 512, 2048), (32_768, 1024, 1024), (151_936, 1024, 256))
"""Vocabulary, hidden size, tokens."""
GROWTH = (1024, 2048, 4096, 8192, 16_384)
MIB = 2**20


def run(options: Options) -> list[Row]:
    """Time and memory per shape, and memory as tokens grow."""
    rows = []
    for vocabulary, hidden, tokens in SHAPES:
        shape = (vocabulary, hidden, tokens // 16 if options.quick else tokens)
        rows += time(options, *shape)
        rows += memory(options, *shape)
    return [*rows, growth(options)]


def time(options: Options, vocabulary: int, hidden: int, tokens: int) -> list[Row]:
    """Forward and backward; all methods must agree on the loss."""
    task = problem(vocabulary, hidden, tokens)
    values: dict[str, float] = {}

    def side(name: str) -> Side:
        loss = method(name)

        def work(_: int) -> Work:
            values[name] = task.gradients(loss)
            return Work(tokens=tokens)

        return work

    path = f"loss time, vocabulary {vocabulary}, {tokens} tokens"
    timed = interleave({name: side(name) for name in METHODS}, options.repetitions, what=path)
    apart = max(abs(value / values[NAIVE] - 1) for value in values.values())
    if apart > 1e-4:
        raise RuntimeError(f"{path}: the methods do not agree on the loss: {values}")
    taken = {name: seconds(series) for name, series in timed.items()}
    liger = min(LIGER, key=lambda name: statistics.median(taken[name]))
    need = 8 * tokens * vocabulary * hidden / limits.known(options).flops
    share = need / statistics.median(taken[OURS])
    medians = {name: statistics.median(series) for name, series in taken.items()}
    return [
        compared(
            f"{path}, against {short}",
            "s",
            taken[OURS],
            taken[peer],
            peer_name=peer,
            sense="<=",
            target=target,
            limit_share=share,
            details={"medians": medians},
        )
        for short, peer, target in (
            ("TRL", TRL, 0.5),
            ("Liger", liger, 1.0),
            ("naive", NAIVE, None),
        )
    ]


def memory(options: Options, vocabulary: int, hidden: int, tokens: int) -> list[Row]:
    """Peak beyond inputs and gradients, one process per method."""
    found = {}
    for name in METHODS:
        found[name] = (
            peak_beyond_gradients(name, vocabulary, hidden, tokens, threads=options.threads) / MIB
        )
        say(f"loss memory, vocabulary {vocabulary}  {name}: {found[name]:.0f} MiB")
    liger = min(LIGER, key=lambda name: found[name])
    return [
        compared(
            f"loss memory, vocabulary {vocabulary}, {tokens} tokens, against {short}",
            "MiB",
            [found[OURS]],
            [found[peer]],
            peer_name=peer,
            sense="<=",
            target=target,
            note="peak beyond inputs and gradients, one process per method",
            details={"all": found},
        )
        for short, peer, target in (
            ("Liger", liger, 0.25),
            ("TRL", TRL, None),
            ("naive", NAIVE, None),
        )
    ]


def growth(options: Options) -> Row:
    """Ours alone as tokens grow: the greatest peak against the least."""
    vocabulary, hidden, _ = SHAPES[0]
    found = {}
    for tokens in GROWTH[:2] if options.quick else GROWTH:
        peak = peak_beyond_gradients(OURS, vocabulary, hidden, tokens, threads=options.threads)
        found[str(tokens)] = peak / MIB
        say(f"loss memory, {tokens} tokens: {found[str(tokens)]:.1f} MiB")
    return Row(
        path="loss memory as tokens grow 1k to 16k",
        unit="MiB",
        ours=max(found.values()),
        ratio=max(found.values()) / min(found.values()),
        sense="<=",
        target=1.10,
        repetitions=1,
        note="ratio: greatest peak beyond hidden states and gradients to the least",
        details={"by_tokens": found},
    )
