"""Hints: a prompt rewritten with what is known of its problem.

A hint is a template such as "{prompt} Hint: the answer is {answer}." with the fields of a problem
row. In `distill` a teacher reads the student's response after the hinted prompt, while the student
saw the plain one: a model with a hint can teach the same model without it (Composer 2.5;
on-policy context distillation).
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from posttrain.engine.errors import ConfigError

Problem = dict[str, Any]
FORM = 'a hint is a template of the prompt, such as "{prompt} Hint: {answer}"'


def check_hint(template: str) -> str:
    """Returns the template. Raises ValueError unless it is text with plain {fields} of a row."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{template!r}: {error}; {FORM}; write {{{{ for a brace") from None
    fields = [
        (field, form, conversion) for _, field, form, conversion in parts if field is not None
    ]
    for field, form, conversion in fields:
        if not field.isidentifier() or form or conversion:
            raise ValueError(f"{template!r}: {{{field}}} is no plain name of a field; {FORM}")
    if not fields:
        raise ValueError(f"{template!r} names no field, so all prompts would be alike; {FORM}")
    return template


def hinted(problem: Mapping[str, Any], template: str, *, where: str) -> str:
    """The prompt with the hint. Raises ConfigError for a field that the row does not have."""
    for _, field, _, _ in string.Formatter().parse(template):
        if field is not None and problem.get(field) is None:
            choices = ", ".join(name for name, value in problem.items() if value is not None)
            raise ConfigError(
                f"{where}: the hint {template!r} names {{{field}}}, which problem "
                f"{problem.get('id')!r} of domain {problem.get('domain')!r} does not have; its "
                f"fields: {choices}"
            )
    return template.format_map(problem)


def also_hinted(
    problems: Mapping[str, Sequence[Problem]], template: str | None, *, where: str
) -> dict[str, list[Problem]]:
    """By domain every row twice, with its own prompt and with the hinted one; no hint: once."""

    def both(rows: Iterable[Problem]) -> list[Problem]:
        if template is None:
            return list(rows)
        return [
            row | {"prompt": prompt}
            for row in rows
            for prompt in (row["prompt"], hinted(row, template, where=where))
        ]

    return {name: both(rows) for name, rows in problems.items()}
