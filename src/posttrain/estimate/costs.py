"""From parts of work to seconds, by the rates of the machine.

A part is tokens times layers times what a token of a layer takes, the output layer where it is
needed, and what calls cost: for small models these are most of it. The counts of calls below were
fitted on the built-in recipe (docs/engine.md says how near that comes).
"""

from __future__ import annotations

import math

from posttrain.backends.budget import MAX_TOKENS
from posttrain.estimate.parts import Part, Work
from posttrain.estimate.rates import Rates
from posttrain.estimate.shapes import Model

MOST_ROWS = 256
"""Rows that are sampled at once (`backends/local.py`)."""
LEARNING = 1.15
"""What the learner takes beside the layers that were measured: masks, the parts of a pass that are
padding, and gradients that are added up."""
PASS_CALLS = 800
"""What a forward pass costs beside its layers, in smallest operations: it is laid out, its columns
are chosen and moved, its metrics added up."""
UPDATE_CALLS = 400
"""What an optimiser step costs beside its arithmetic."""
STEP_CALLS = 60
"""What a token of all rows costs beside layers and output layer."""
ROW_CALLS = 40
"""What a row costs that is drawn, encoded, decoded, verified or written."""
WORKERS_GAIN = 0.8
"""How much of a further thread forward passes of a tiny model make use of beside each other."""
STAGE_SECONDS = 0.5
"""A stage without any work: its process, its verifiers, its commit."""
RUN_SECONDS = 4.0
"""Of the first stage of a run, before it begins to work: what stages import is imported once."""
ROW_SECONDS = 1e-4
"""A row that is made, checked or sorted out without a model."""
READ_SECONDS = 8e-5
"""A row that is read and encoded before the first step."""
LOADED_BYTES = 5e8
"""Bytes of weights in a second: read and converted, or written and hashed."""


def seconds_of_part(part: Part, model: Model, rates: Rates, *, threads: int) -> float:
    """What a part takes, on models of this shape."""
    of_call = {"learn": _learning, "score": _reading, "sample": _sampling}[part.do]
    workers = 1.0
    if part.do == "learn" and model.is_tiny:
        passes = math.ceil(part.read / MAX_TOKENS)
        workers += WORKERS_GAIN * (min(threads, max(1, passes)) - 1)
    return part.calls * (of_call(part, model, rates) / workers + _rows(part, rates))


def _rows(part: Part, rates: Rates) -> float:
    return part.rows * ROW_CALLS * rates.operation if part.do != "score" else 0.0


def _passes(part: Part) -> float:
    """Forward passes of a call; each update has some of its own."""
    return max(part.updates, float(math.ceil(part.read / MAX_TOKENS)), 1.0)


def _learning(part: Part, model: Model, rates: Rates) -> float:
    passes = _passes(part)
    layers = model.layers * (passes * rates.learn_fixed + part.read * rates.learn_token)
    head = part.rows * part.response * (rates.head_pair if part.pair else rates.head_learn)
    steps = part.updates * (model.parameters * rates.adam + UPDATE_CALLS * rates.operation)
    return LEARNING * (layers + head) + steps + passes * PASS_CALLS * rates.operation


def _reading(part: Part, model: Model, rates: Rates) -> float:
    passes = _passes(part)
    layers = model.layers * (passes * rates.score_fixed + part.read * rates.score_token)
    head = part.rows * part.response * rates.head_score
    return layers + head + passes * PASS_CALLS * rates.operation


def _sampling(part: Part, model: Model, rates: Rates) -> float:
    """Prompts once for each group, then a step for every token of the longest responses."""
    prompts = part.rows / part.group * part.prompt
    passes = max(1.0, prompts / MAX_TOKENS)
    prefill = model.layers * (passes * rates.score_fixed + prompts * rates.score_token)
    row_steps = part.rows * part.response
    longest = max(part.response, part.longest - part.prompt)
    # Rows wait for room where there are more of them; the last ones go on alone.
    at_once = min(part.rows, MOST_ROWS)
    steps = max(longest, row_steps / at_once + (longest if part.rows > at_once else 0) / 2)
    positions = part.prompt + part.response / 2
    row = rates.decode_row + rates.decode_position * positions
    layers = model.layers * (steps * rates.decode_fixed + row_steps * row)
    draw = steps * rates.draw_fixed + row_steps * rates.draw_row
    return prefill + layers + draw + steps * STEP_CALLS * rates.operation


def overhead(work: Work, weights: float) -> float:
    """What a stage takes beside its models' work, with so many bytes of weights loaded or saved."""
    rows = work.rows * ROW_SECONDS + work.read_rows * READ_SECONDS
    return STAGE_SECONDS + weights / LOADED_BYTES + rows
