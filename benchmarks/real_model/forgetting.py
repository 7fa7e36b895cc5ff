"""What models still know of the world: questions that no stage was trained on.

Source: benchmarks/README.md, "A real language model".
In one line: `evaluate{models}`.
`base`, `models` and `specialists` are checkpoints: a directory, and JSON objects of names to
directories. All are compared with the base, and the models with each other.
"""

import json

from posttrain import Recipe, Stage


def recipe(r: Recipe, base: str, models: str, specialists: str) -> Stage:
    students, along = (
        {name: r.model(path, name=name) for name, path in json.loads(text).items()}
        for text in (models, specialists)
    )
    return r.evaluate(students, init=r.model(base), along=along, name="knowledge")
