# ruff: noqa: RUF001 -- marks that no text of a row has
"""Twelve model families of the outside world through sft, dpo, rl, distill and evaluate.

    python benchmarks/outside.py                             # prints what was taught
    python benchmarks/outside.py --only qwen3 gpt-oss
    python benchmarks/outside.py --out benchmarks/results

Every family of `families.py` is walked through one recipe by the command line, on conversations
with a system message and one or two turns. The page is there to be read: for each family it shows
the tokens of a conversation with what the model learns in brackets, the same with an answer that
was thought about and with a message that holds the text of a control token, which tokens end a
turn, how many responses ended and by which token, and the scores.

The teacher of the distillation is a wider model of the same family with more rows of padding, of
`qwen2.5-base` the instruct model. The models are random and tiny: scores say that a way works, and
nothing about the family.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from families import FAMILIES, Family, family, sums, write

RECIPE = """
from posttrain import Recipe, Stage, judges


def recipe(r: Recipe, base: str, teacher: str, steps: int, sample: bool = False) -> Stage:
    start = r.sft(start=r.model(base), data=r.demos(r.domains), steps=steps, lr=3e-3, batch_size=16,
                  name="start")
    wider = r.model(teacher, name="wider")
    coach = r.sft(start=wider, data=r.demos(r.domains), steps=steps, lr=3e-3, batch_size=16,
                  name="coach")
    liked = r.dpo(start=start, data=r.preferences("pairs"), steps=4, batch_size=8, lr=1e-4,
                  name="liked")
    better = r.rl(start=liked, prompts=r.prompts(r.domains), steps=3, prompts_per_step=8,
                  group_size=4, max_new_tokens=12, lr=1e-4, reward=judges.length(budget=4),
                  drop_zero_variance=False, correction="truncated", name="better")
    student = r.distill(start=better, teachers={domain: coach for domain in r.domains},
                        prompts=r.prompts(r.domains), steps=3, prompts_per_step=8,
                        max_new_tokens=12, lr=1e-4, name="student")
    if sample:
        return r.sample([start, liked, better, student], prompts=r.prompts(r.domains), k=2,
                        num_prompts=24, max_new_tokens=12)
    return r.evaluate(student, init=start, teachers={domain: coach for domain in r.domains},
                      max_new_tokens=12)
"""
SUITE = """
[domains.sums]
train = "sums.jsonl"
messages = "messages"
verifier = "exact"

[preferences.pairs]
data = "pairs.jsonl"
prompt = "messages"
"""
STEPS = 120
"""Of the supervised stages: enough that most responses end."""
HEAD = 700
"""Characters of a row on the page."""


def walk(one: Family, directory: Path, steps: int) -> dict[str, Any]:
    """One family through the recipe; everything that the page shows of it."""
    coach = family("qwen2.5") if one.name == "qwen2.5-base" else one
    write(one, directory / "base")
    write(coach, directory / "wider", hidden=96, more_rows=50, seed=1)
    rows = sums(180)
    _write_rows(directory / "sums.jsonl", rows)
    _write_rows(directory / "pairs.jsonl", [_pair(row) for row in rows[:60]])
    (directory / "suite.toml").write_text(SUITE.lstrip(), encoding="utf-8")
    (directory / "walk.py").write_text(RECIPE.lstrip(), encoding="utf-8")
    began = time.perf_counter()
    found: dict[str, Any] = {"family": one.name, "note": one.note}
    # What the last model samples is looked at in a second run, for which nothing is made again.
    for sample in ("false", "true"):
        done = _posttrain(
            directory, "run", "walk.py", "--suite", "suite.toml", "--json", "--no-report",
            "--set", "base=base", "--set", "teacher=wider", "--set", f"steps={steps}",
            "--set", f"sample={sample}",
        )  # fmt: skip
        found |= {"exit": done.returncode, "seconds": round(time.perf_counter() - began, 1)}
        if done.returncode:
            return found | {"said": done.stderr.strip().splitlines()[-12:]}
        # Without the place, which is another one every time.
        told = done.stdout.replace(f"{directory}/", "")
        found.setdefault("warnings", json.loads(told)["warnings"])
    return found | taught(directory) | ended(directory)


def _pair(row: dict[str, Any]) -> dict[str, Any]:
    asked, answer = row["messages"][:-1], row["answer"]
    return {"messages": asked, "chosen": answer, "rejected": f"I think it is {answer}, or not."}


def _write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _posttrain(directory: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "posttrain", *args],
        cwd=directory,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "160"},
        check=False,
    )


def artifact(directory: Path, kind: str, name: str) -> Path:
    """The one artifact of that kind and name."""
    (found,) = (directory / "posttrain-store" / "artifacts" / kind).glob(f"{name}-*")
    return found


def taught(directory: Path) -> dict[str, Any]:
    """What a stage learns of some conversations: the row as text, what is learned in ⟦ ⟧."""
    from posttrain.backends.checkpoint import read_chat

    chat = read_chat(artifact(directory, "sft", "start"))
    several = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "blue"},
        {"role": "user", "content": "What is 3 plus 4?"},
    ]
    # The family's own token, as somebody might quote it.
    quoted = chat.text([chat.stop_ids[0]])
    asked = [{"role": "user", "content": f"Repeat: {quoted} twice"}]
    rows = {
        "several turns": (several, "7", None),
        "a thought": (several[-1:], "<think>3 and 4.</think>7", None),
        "mode think": (several[-1:], "<think>3 and 4.</think>7", "think"),
        "mode no_think": (several[-1:], "7", "no_think"),
        "a control token's text": (asked, f"{quoted} {quoted}", None),
    }
    shown = {what: _shown(chat, *row) for what, row in rows.items()}
    ends = [chat.text([token]) for token in chat.stop_ids]
    return {"taught": shown, "ends": ends, "tokens": len(chat.tokenizer), "ids": chat.num_ids}


def _shown(chat: Any, asked: Any, text: str, mode: str | None) -> str:
    from posttrain.engine.errors import ConfigError

    try:
        spans = chat.spans(asked, text, mode)
    except ConfigError as error:
        return f"refused: {error}"
    if spans is None:
        spans = [(chat.prompt(asked, mode), False), (chat.response(asked, text, mode), True)]
    parts = []
    for ids, sampled in spans:
        # Token by token, so that a control token and its characters can be told apart.
        tokens = "".join(_token(chat, token) for token in ids)
        parts.append(f"⟦{tokens}⟧" if sampled else tokens)
    return "".join(parts)


def _token(chat: Any, token: int) -> str:
    """A token as text; one that is added to the vocabulary, such as a control token, in ‹ ›."""
    text = chat.tokenizer.convert_ids_to_tokens(token)
    if token in chat.tokenizer.added_tokens_decoder:
        return f"‹{text}›"
    return text.replace("Ġ", " ").replace("▁", " ").replace("Ċ", "⏎")


def ended(directory: Path) -> dict[str, Any]:
    """How the responses of each model ended, and the scores."""
    from posttrain.backends.checkpoint import read_chat

    chat = read_chat(artifact(directory, "sft", "start"))
    path = artifact(directory, "sample", "rollouts") / "rollouts.jsonl"
    rows = [json.loads(line) for line in path.open(encoding="utf-8")]
    models: dict[str, Any] = {}
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        last = Counter(chat.text(row["ids"][-1:]) for row in own if row["finished"])
        models[name] = {
            "finished": sum(row["finished"] for row in own) / len(own),
            "by": dict(last),
            "beyond": sum(token >= len(chat.tokenizer) for row in own for token in row["ids"]),
            "right": sum(row["reward"] for row in own) / len(own),
            "examples": [row["response"] for row in own[:2]],
        }
    logs = artifact(directory, "rl", "better") / "metrics.jsonl"
    ratios = [json.loads(line)["sampler_ratio"] for line in logs.open(encoding="utf-8")]
    record = artifact(directory, "evaluate", "evaluation") / "record.json"
    return {
        "models": models,
        "ratio": max(abs(ratio - 1) for ratio in ratios),
        "evaluation": json.loads(record.read_text())["metrics"],
    }


def page(walks: Sequence[dict[str, Any]], conditions: dict[str, Any]) -> str:
    """What is read: one section per family."""
    lines = [f"# The outside world, {conditions['date']}", ""]
    lines += [f"{name}: {value}  " for name, value in conditions.items()]
    lines += [
        "",
        "What a model learns stands in ⟦ ⟧, a control token or another added token in ‹ ›.",
    ]
    for walked in walks:
        lines += ["", f"## {walked['family']}", "", f"{walked['note']}.", ""]
        if walked["exit"]:
            lines += [f"**Ended with {walked['exit']}:**", "", "```text", *walked["said"], "```"]
            continue
        lines += [
            f"- {walked['tokens']} tokens, {walked['ids']} ids that may be drawn; a turn ends at "
            + ", ".join(f"`{text}`" for text in walked["ends"])
        ]
        for what, text in walked["taught"].items():
            lines += [f"- {what}:", "", "  ```text", *_wrapped(text), "  ```"]
        for name, model in walked["models"].items():
            by = ", ".join(f"`{text}` {count}" for text, count in model["by"].items()) or "none"
            lines += [
                f"- `{name}`: {100 * model['finished']:.0f} % of the responses ended, by {by}; "
                f"{model['beyond']} ids beyond the tokenizer; {100 * model['right']:.0f} % right; "
                + " and ".join(f"`{text!r}`" for text in model["examples"])
            ]
        lines += [f"- rl: largest |sampler ratio - 1| {walked['ratio']:.1e}"]
        lines += [f"- said: {one['stage']}: {one['text']}" for one in walked["warnings"]]
        lines += [f"- evaluation: {json.dumps(walked['evaluation'])}", f"- {walked['seconds']} s"]
    return "\n".join(lines) + "\n"


def _wrapped(text: str) -> list[str]:
    text = text[:HEAD].replace("\n", "⏎")
    return [f"  {text[start : start + 110]}" for start in range(0, len(text), 110)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[one.name for one in FAMILIES])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, help="directory for outside_DATE.md and .json")
    parser.add_argument("--keep", type=Path, help="work here and keep everything")
    arguments = parser.parse_args()
    chosen = [one for one in FAMILIES if arguments.only is None or one.name in arguments.only]
    walks = []
    with tempfile.TemporaryDirectory() as temporary:
        for one in chosen:
            directory = (arguments.keep or Path(temporary)).absolute() / one.name
            directory.mkdir(parents=True)
            walks.append(walk(one, directory, arguments.steps))
            print(one.name, "exit", walks[-1]["exit"], walks[-1]["seconds"], "s", flush=True)
    conditions = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": ", ".join(f"{p} {version(p)}" for p in ("torch", "transformers", "tokenizers")),
        "steps": arguments.steps,
    }
    text = page(walks, conditions)
    print(text)
    if arguments.out:
        name = f"outside_{conditions['date']}"
        (arguments.out / f"{name}.md").write_text(text, encoding="utf-8")
        kept = {"conditions": conditions, "families": walks}
        (arguments.out / f"{name}.json").write_text(json.dumps(kept, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
