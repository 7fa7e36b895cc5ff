"""What models still know of the world: questions that no stage was trained on.

Source: benchmarks/README.md, "A real language model".
In one line: `evaluate{models}`.
`models` is a JSON object of names to checkpoint directories; the first one is what the others are
compared with.
"""

import json

from posttrain import Recipe, Stage


def recipe(r: Recipe, models: str) -> Stage:
    (first, start), *others = json.loads(models).items()
    before = r.model(start, name=first)
    students = {name: r.model(path, name=name) for name, path in others}
    return r.evaluate(students, init=before, name="knowledge")
