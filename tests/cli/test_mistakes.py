"""What people get wrong, and what they are told: where, the value, the choices, how to mend it.

None of these starts a stage (a verifier of one's own apart, which only its answers show to be
wrong), and none is told in the words of Python: no name of an exception that is not the user's own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

START = """from posttrain import algorithms, judges

def recipe(r):
    b = r.pretrain(data=r.demos(r.domains), steps=1)
    p, d = r.prompts(r.domains), r.demos(r.domains)
    teachers = dict.fromkeys(r.domains, b)
    return """
"""What stands above the mistake, which is in line 7."""

# What is wrong -> the call, and what has to stand in the message.
CALLS: dict[str, tuple[str, list[str]]] = {
    "a verb that is misspelt": (
        "r.distil(start=b, teachers=teachers, prompts=p, steps=1)",
        ["r.distil", "did you mean 'distill'?"],
    ),
    "a judge that is misspelt": (
        "r.rl(start=b, prompts=p, steps=1, reward=judges.verifer())",
        ["judges.verifer", "did you mean 'verifier'?"],
    ),
    "a setting that is misspelt": (
        "r.rl(start=b, prompts=p, stepps=1)",
        ["'rl' (rl)", "'stepps'", "did you mean 'steps'?"],
    ),
    "a setting by the name that others give it": (
        "r.sft(start=b, data=d, steps=1, learning_rate=1e-4)",
        ["'sft' (sft)", "'learning_rate'", "here it is called 'lr'"],
    ),
    "an algorithm that is misspelt": (
        "r.distill(start=b, teachers=teachers, prompts=p, steps=1, estimator='topk')",
        ["'estimator'", "'topk'", "did you mean 'top_k'?"],
    ),
    "a field of an algorithm that is misspelt": (
        "r.rl(start=b, prompts=p, steps=1, kl=algorithms.KL(0.1, placed='loss'))",
        ["KL, field 'placed': unknown option", "choices: ", "coef"],
    ),
    "a field of an algorithm that is missing": (
        "r.rl(start=b, prompts=p, steps=1, critique=algorithms.Critique())",
        ["Critique, field 'weight'"],
    ),
    "a setting of another choice": (
        "r.rl(start=b, prompts=p, steps=1, clip_high=0.3)",
        ["'clip_high'", "a setting of a choice", "surrogate.clip_high"],
    ),
    "a domain that is misspelt": (
        "r.rl(start=b, prompts=r.prompts('sum'), steps=1)",
        ["'sum'", "suite 'pairs'", "did you mean 'sums'?"],
    ),
    "a stage without its start": (
        "r.sft(data=d, steps=1)",
        ["r.sft: start is missing", "r.sft(start=..., data=...,"],
    ),
    "arguments without names": (
        "r.rl(b, p, steps=1)",
        ["r.rl", "2 values without a name", "r.rl(start=..., prompts=...,"],
    ),
    "an option that prompts do not have": (
        "r.rl(start=b, prompts=r.prompts('sums', modes='think'), steps=1)",
        ["r.prompts", "'modes'", "did you mean 'mode'?"],
    ),
    "a name for a stage": (
        "r.sft(start='base', data=d, steps=1)",
        ["'sft'", "start = 'base' is not a model", "pretrain, sft"],
    ),
    "a file for the data of sft": (
        "r.sft(start=b, data='mine.jsonl', steps=1)",
        ["'sft'", "'mine.jsonl'", "r.demos(...)", "r.table("],
    ),
    "prompts for the data of sft": (
        "r.sft(start=b, data=p, steps=1)",
        ["'sft'", "r.prompts('sums', 'copies')", "r.demos(...)"],
    ),
    "a file for preferences": (
        "r.dpo(start=b, data='pairs.jsonl', steps=1)",
        ["'dpo' (dpo)", "'pairs.jsonl'", "r.pairs(...)", "r.preferences("],
    ),
    "demonstrations for preferences": (
        "r.reward_model(start=b, data=d, steps=1)",
        ["(reward_model)", "r.demos('sums', 'copies')", "r.preferences("],
    ),
    "neither steps nor epochs": (
        "r.sft(start=b, data=d)",
        ["'sft' (sft)", "exactly one of steps and epochs"],
    ),
    "a text for a number": (
        "r.rl(start=b, prompts=p, steps=1, lr='3e-4')",
        ["'lr'", "'3e-4'", "0.0003 without quotes"],
    ),
    "a teacher for all instead of a dict": (
        "r.distill(start=b, teachers=b, prompts=p, steps=1)",
        ["'student'", "stage 'base' (pretrain)", "dict.fromkeys(r.domains, teacher)"],
    ),
    "a domain without a teacher": (
        "r.distill(start=b, teachers={'sums': b}, prompts=p, steps=1)",
        ["'student'", "'copies' has no teacher", '"self"'],
    ),
    "None for a teacher": (
        "r.distill(start=b, teachers={'sums': b, 'copies': None}, prompts=p, steps=1)",
        ["teachers['copies'] = None", '"self"'],
    ),
    "a text for a judge": (
        "r.rl(start=b, prompts=p, steps=1, reward='verifier')",
        ["reward = 'verifier'", "judges.verifier()"],
    ),
    "a language model for a reward model": (
        "r.rl(start=b, prompts=p, steps=1, reward=judges.scalar(b))",
        ["judge scalar", "stage 'base'", "reward_model"],
    ),
    "an endpoint that cannot be": (
        "r.rl(start=b, prompts=p, steps=1, reward=judges.llm(url='http://host:99999', model='m'))",
        ["judge llm", "'http://host:99999'", "0-65535"],
    ),
    "one candidate": ("r.best(b)", ["(best)", "stage 'base' (pretrain)", "a list of models"]),
    "models that are given by name": (
        "r.merge(['a', 'b'])",
        ["'merged'", "models[0] = 'a' is not a model"],
    ),
    "aux without a weight": (
        "r.sft(start=b, data=d, steps=1, aux=d)",
        ["'sft'", "aux = r.demos('sums', 'copies')", "(r.demos(...), 0.5)"],
    ),
    "a number for domains": ("r.evaluate(b, init=b, domains=3)", ["domains = 3", "sums, copies"]),
    "a text for a model that is evaluated": (
        "r.evaluate('base', init=b)",
        ["'evaluation'", "'base'", "it takes a model"],
    ),
    "no model at all": ("r.evaluate({})", ["'evaluation'", "no student"]),
    "a checkpoint that is no text": ("r.model(3)", ["model 'base'", "3", "directory"]),
    "a name that is no file name": (
        "r.sft(start=b, data=d, steps=1, name='a/b')",
        ["'a/b'", "letters, digits"],
    ),
    "a setting of an algorithm that is misspelt": (
        "r.rl(start=b, prompts=p, steps=1, surrogate=algorithms.Clip(clip=0.2))",
        ["Clip, field 'clip'", "did you mean 'clip_low'?"],
    ),
    "a setting of an algorithm that is missing": (
        "r.select(r.sample(b, prompts=p), how=algorithms.TopShare())",
        ["TopShare, field 'share'", "write share=..."],
    ),
    "too many settings of an algorithm": (
        "r.rl(start=b, prompts=p, steps=1, kl=algorithms.KL(1, 2, 3, 4, 5, 6, 7, 8))",
        ["KL takes coef"],
    ),
    "an argument of a judge that is misspelt": (
        "r.rl(start=b, prompts=p, steps=1, reward=judges.scalar(b, sqash=True))",
        ["judges.scalar", "'sqash'", "did you mean 'squash'?"],
    ),
    "a judge of nothing": (
        "r.rl(start=b, prompts=p, steps=1, reward=judges.compare())",
        ["judges.compare: judge missing"],
    ),
    "a word that is none of the choices": (
        "r.sft(start=b, data=d, steps=1, on_long='dorp')",
        ["'on_long'", "'dorp'", "did you mean 'drop'? choices: drop, error, truncate"],
    ),
    "a number for an algorithm": (
        "r.rl(start=b, prompts=p, steps=1, kl=0.02)",
        ["'kl': 0.02", "write kl=KL(0.02)"],
    ),
    "a setting of a choice by the name that others give it": (
        "r.rl(start=b, prompts=p, steps=1, beta=0.02)",
        ["'beta'", "a setting of a choice, kl.coef"],
    ),
    "an argument of a verb that is misspelt": (
        "r.evaluate(b, inti=b)",
        ["'inti'", "did you mean 'init'?"],
    ),
    "an argument of a verb by the name that others give it": (
        "r.dpo(start=b, data=r.pairs(r.sample(b, prompts=p)), steps=1, ref_model=b)",
        ["'ref_model'", "did you mean 'reference'?"],
    ),
    "a verb by the name that others give it": (
        "r.grpo(start=b, prompts=p, steps=1)",
        ["there is no r.grpo", "here it is r.rl(...)"],
    ),
    "several data": (
        "r.sft(start=b, data=[d, d], steps=1)",
        ["'sft'", "r.mix({data: weight, ...})"],
    ),
    "several targets": ("[b]", ["recipe() returned [stage 'base' (pretrain)]", "r.evaluate"]),
    "a part that stages do not have": ("r.evaluate(b.model)", ["stage 'base' (pretrain).model"]),
}

OURS = (
    "Traceback",
    "AttributeError",
    "KeyError",
    "TypeError",
    "ZeroDivisionError",
    "RecursionError",
    "ValidationError",
    "pydantic",
)


def told(result: Any, words: list[str], *, code: int = 2) -> None:
    """One message with all of `words`, and none of Python's."""
    assert result.code == code, result.err
    assert result.err.count("error: ") == 1, result.err
    missing = [word for word in words if word not in result.err]
    assert not missing, (missing, result.err)
    assert not [word for word in OURS if word in result.err], result.err


@pytest.mark.parametrize("mistake", CALLS)
def test_a_call_of_a_recipe(cli: Callable[..., Any], place: Path, mistake: str) -> None:
    call, words = CALLS[mistake]
    (place / "mine.py").write_text(START + call + "\n")
    result = cli("plan", "mine.py", "--suite", "pairs.toml")
    told(result, words)
    assert "mine.py" in result.err
    assert not (place / "posttrain-store").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "student.learning_rate=1"], ["'learning_rate'", "here it is called 'lr'"]),
        (["--set", "student.learning_rate="], ["'learning_rate'", "here it is called 'lr'"]),
        (["--set", "student.lr="], ["'student' (distill)", "'lr'", "''"]),
        (["--set", "studnt.lr=1"], ["studnt", "did you mean 'student'?"]),
        (["--set", "student.steps=" + "[" * 5000], ["'student' (distill)", "'steps'", "integer"]),
        (["--set", "student.steps=" + "9" * 5000], ["'student' (distill)", "'steps'"]),
        (["--set", "student.optimizer.beta=0.9"], ["optimizer.beta", "did you mean 'beta"]),
        (["--suite", "nosuch.toml"], ["nosuch.toml does not exist", "pairs.toml"]),
        (["--suite", "sums.jsonl"], ["'sums.jsonl'", ".toml or .py"]),
        (["--suite", "pairs"], ["unknown suite 'pairs'", "did you mean 'pairs.toml'?"]),
    ],
)
def test_an_option(
    cli: Callable[..., Any], place: Path, arguments: list[str], words: list[str]
) -> None:
    suite = [] if "--suite" in arguments else ["--suite", "pairs.toml"]
    told(cli("plan", "mini.py", *suite, *arguments), words)


@pytest.mark.parametrize(
    ("name", "words"),
    [("seed", "is not a value of type int"), ("steps", "has no parameter 'steps'")],
)
def test_a_value_of_any_length_is_told_shortly(
    cli: Callable[..., Any], name: str, words: str
) -> None:
    said = cli("plan", "mopd", "--set", f"{name}=" + "[" * 5000)
    assert said.code == 2 and words in said.err
    assert len(said.err) < 600


SUITES = {
    "raises": ("def suite():\n    return 1 / 0\n", ["division by zero (line 2)"]),
    "ends the program": ("import sys\nsys.exit(0)\n", ["mine.py: loading the suite", "(line 2)"]),
    "ends the program later": ("import sys\ndef suite():\n    sys.exit(0)\n", ["(line 3)"]),
    "wants an argument": ("def suite(x):\n    pass\n", ["suite()", "'x'"]),
    "returns no suite": ("def suite():\n    return 3\n", ["int", "posttrain.suites.domain.Suite"]),
    "holds no domains": (
        "from posttrain.suites.domain import Suite\n"
        "def suite():\n    return Suite(name='x', domains={'a': 3})\n",
        ["domains['a'] is 3"],
    ),
}


@pytest.mark.parametrize("mistake", SUITES)
def test_a_suite_in_python(cli: Callable[..., Any], place: Path, mistake: str) -> None:
    text, words = SUITES[mistake]
    (place / "mine.py").write_text(text)
    result = cli("plan", "mini.py", "--suite", "mine.py")
    assert result.code == 2, result.err
    assert result.err.count("error: ") == 1
    assert all(word in result.err for word in words), result.err
    assert "Traceback" not in result.err


def test_a_suite_that_is_nested_too_deep(cli: Callable[..., Any], place: Path) -> None:
    text = (place / "pairs.toml").read_text()
    deep = f"x = {'[' * 3000}{']' * 3000}\n"
    (place / "pairs.toml").write_text(deep + text)
    told(cli("plan", "mini.py", "--suite", "pairs.toml"), ["pairs.toml", "not a TOML file"][:1])


VERIFIERS = {
    "returns 2": ("def score(r, p):\n    return 2\n", ["returned 2 (int)", "from 0 to 1"], 1),
    "returns nothing": ("def score(r, p):\n    pass\n", ["returned None", "from 0 to 1"], 1),
    "ends the program": ("def score(r, p):\n    exit(3)\n", ["SystemExit: 3 (line 2)"], 1),
    "does not load": ("import nowhere\ndef score(r, p):\n    return 1\n", ["'nowhere'"], 2),
    "takes one value": ("def score(r):\n    return 1\n", ["line 1", "score(response, problem)"], 2),
}


@pytest.mark.parametrize("mistake", VERIFIERS)
def test_a_verifier_is_blamed_by_the_name_of_its_own_file(
    cli: Callable[..., Any], place: Path, mistake: str
) -> None:
    text, words, code = VERIFIERS[mistake]
    (place / "grade.py").write_text(text)
    suite = (place / "pairs.toml").read_text().replace('"exact"', '"python:grade.py:score"', 1)
    (place / "pairs.toml").write_text(suite)
    (place / "data.py").write_text(START + "b\n")
    result = cli("run", "data.py", "--suite", "pairs.toml", "--no-report")
    told(result, ["grade.py", *words], code=code)
    assert "verifier.py" not in result.err


def test_a_checkpoint_without_a_tokenizer(
    cli: Callable[..., Any], place: Path, models: dict[str, str]
) -> None:
    shutil.copytree(models["start"], place / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (place / "bare" / name).unlink()
    told(cli("plan", "mini.py", "--suite", "pairs.toml", "--set", "base=./bare"), ["tokenizer"])


def test_a_row_that_is_none(cli: Callable[..., Any], place: Path) -> None:
    rows = (place / "sums.jsonl").read_text().splitlines()
    rows[4] = json.dumps({"prompt": "1+1=", "answer": None, "demo": "2"})
    rows[7] = json.dumps({"prompt": ["1+1="], "answer": "2", "demo": "2"})
    (place / "sums.jsonl").write_text("\n".join(rows) + "\n")
    told(
        cli("plan", "mini.py", "--suite", "pairs.toml"),
        ["sums.jsonl", "line 5", "'answer'", "line 8", "'prompt'"],
    )


def test_a_column_of_demonstrations_without_any(cli: Callable[..., Any], place: Path) -> None:
    rows = [json.loads(line) for line in (place / "sums.jsonl").read_text().splitlines()]
    lines = [json.dumps(row | {"demo": ""}) for row in rows]
    (place / "sums.jsonl").write_text("\n".join(lines) + "\n")
    told(
        cli("plan", "mini.py", "--suite", "pairs.toml"),
        ["'base'", "'sums' has no demonstration", "all of its 81 rows"],
    )


def test_two_columns_for_what_is_asked(cli: Callable[..., Any], place: Path) -> None:
    text = (place / "pairs.toml").read_text()
    both = text.replace('demo = "demo"', 'prompt = "prompt"\nmessages = "talk"', 1)
    (place / "pairs.toml").write_text(both)
    told(
        cli("plan", "mini.py", "--suite", "pairs.toml"),
        ["pairs.toml: domains.sums", "messages = 'talk'", "prompt = 'prompt'"],
    )
