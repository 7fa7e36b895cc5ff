"""Rows that a model has too few positions for: refused, left out or shortened before the first
step, in every stage that reads rows, for all models that read them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.backends.chat import Chat
from posttrain.backends.checkpoint import LanguageModel, chat_of, read_chat
from posttrain.backends.scalar import load_scalar, save_scalar
from posttrain.engine.errors import ConfigError
from posttrain.engine.work import read_warnings
from posttrain.stages.aux_losses import demo_batch
from posttrain.stages.config import build_config
from posttrain.stages.context import Context
from posttrain.stages.lengths import Reader, cut_to, fit_demos, fit_prompts, fit_responses

RunStage = Callable[..., Any]
Inputs = Mapping[str, str]
LONG = "long " + "x" * 70
ID = "the-long-one"


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def short(domains: Inputs, tmp_path: Path) -> Callable[..., Inputs]:
    """`short(prompt=LONG)`: the domain of short words, with one more row, of these fields, in each
    split; without fields as it is."""

    def make(**fields: Any) -> Inputs:
        copy = tmp_path / f"short-{len(list(tmp_path.glob('short-*')))}"
        shutil.copytree(domains["domains.short"], copy)
        for split in ("train", "validation", "heldout"):
            rows = rows_of(copy / f"{split}.jsonl")
            more = [rows[0] | {"id": ID} | fields] if fields else []
            write(copy / f"{split}.jsonl", [*rows[:5], *more, *rows[5:]])
        return {"domains.short": str(copy)}

    return make


@pytest.fixture
def pairs(tmp_path: Path, data: str) -> Callable[..., Inputs]:
    def make(**fields: Any) -> Inputs:
        rows = rows_of(Path(data) / "pairs.jsonl")
        write(Path(data) / "pairs.jsonl", [*rows, rows[0] | {"id": ID} | fields])
        return {"data": data}

    return make


@pytest.fixture
def small(
    make_model: Callable[..., LanguageModel], save_model: Callable[..., str], models: Inputs
) -> Callable[..., str]:
    """`small(positions)`: the directory of a model with so many positions."""
    stop = list(read_chat(models["start"]).stop_ids)

    def make(positions: int, *, scalar: bool = False) -> str:
        path = save_model(make_model(positions=positions, stop=stop))
        if scalar:
            save_scalar(load_scalar(path), Path(path))
        return path

    return make


def told(ran: Any) -> str:
    (text,) = read_warnings(ran.out.parent)
    return text


STEPS = {"steps": 2, "prompts_per_step": 4, "max_new_tokens": 4}
ANSWERS = {"max_new_tokens": 4, "num_problems": 12, "bootstrap": 100}


@pytest.mark.parametrize(
    "kind", ["pretrain", "sft", "rl", "distill", "sample", "profile", "evaluate", "best"]
)
def test_a_long_prompt_is_refused_before_the_first_step_or_left_out(
    kind: str, run_stage: RunStage, models: Inputs, short: Callable[..., Inputs]
) -> None:
    """64 positions everywhere."""
    settings, inputs = {
        "pretrain": ({"steps": 2, "max_positions": 64}, {}),
        "sft": ({"steps": 2, "batch_size": 8}, {"start": models["start"]}),
        "rl": (STEPS | {"group_size": 2}, {"start": models["start"]}),
        "distill": (
            STEPS | {"routes": {"short": "one"}},
            {"start": models["start"], "teachers.one": models["one"]},
        ),
        "sample": (
            {"max_new_tokens": 4, "routes": {"short": ["one"]}},
            {"models.one": models["one"]},
        ),
        "profile": ({"max_new_tokens": 4, "n": 2}, {"model": models["one"]}),
        "evaluate": (ANSWERS, {"student": models["start"], "init": models["one"]}),
        "best": (ANSWERS, {"candidates.a": models["one"], "candidates.b": models["two"]}),
    }[kind]
    long = short(prompt=LONG)
    with pytest.raises(ConfigError) as refused:
        run_stage(kind, settings, {**inputs, **long})
    message = str(refused.value)
    for part in (f"stage 'my_{kind}'", ID, "'short'", LONG[:40], "64 positions", "on_long"):
        assert part in message
    assert ("max_new_tokens = 4" in message) == (kind not in ("pretrain", "sft"))
    assert "1 of " in message

    dropped = run_stage(kind, settings | {"on_long": "drop"}, {**inputs, **long})
    assert '"drop" leaves out 1 of' in told(dropped) and "64 positions" in told(dropped)
    for file in ("rollouts.jsonl", "profile.jsonl"):
        if (dropped.out / file).exists():
            assert ID not in (dropped.out / file).read_text()
    if kind in ("sft", "sample", "profile"):
        # As if the row had never been there.
        without = run_stage(kind, settings, {**inputs, **short()})
        assert without.lines[-1]["tokens"] == dropped.lines[-1]["tokens"]
    truncated = run_stage(kind, settings | {"on_long": "truncate"}, {**inputs, **long})
    assert "cuts the " in told(truncated) and " of 1 of" in told(truncated)


def test_what_fits_keeps_its_bits(
    run_stage: RunStage, models: Inputs, short: Callable[..., Inputs], same: Callable[..., bool]
) -> None:
    inputs = {"start": models["start"], **short()}
    for kind, settings in (
        ("sft", {"steps": 2, "batch_size": 8}),
        ("rl", STEPS | {"group_size": 2}),
    ):
        ran = [
            run_stage(kind, settings | {"on_long": how}, inputs)
            for how in ("error", "drop", "truncate")
        ]
        assert same(ran[0], ran[1]) and same(ran[0], ran[2])
        assert all(not read_warnings(one.out.parent) for one in ran)


def test_a_domain_that_would_lose_all_rows_is_refused(
    run_stage: RunStage, models: Inputs, small: Callable[..., str], domains: Inputs
) -> None:
    inputs = {"start": small(14), **domains}
    settings = {"steps": 1, "on_long": "drop"}
    fixes = "set on_long = .truncate. for.*would leave no row of 'short'"
    with pytest.raises(ConfigError, match=f"89 of 89 rows.*{fixes}"):
        run_stage("sft", settings, inputs)


def test_a_truncated_demonstration_has_no_end(
    run_stage: RunStage,
    models: Inputs,
    short: Callable[..., Inputs],
    make_model: Any,
    tmp_path: Path,
) -> None:
    long = short(demo="y" * 90)
    ran = run_stage("sft", {"steps": 1, "on_long": "truncate"}, {"start": models["start"], **long})
    assert "cuts the end of 1 of 90 rows (short): with up to" in told(ran)
    chat = chat_of(make_model())
    batch = demo_batch(
        [{"prompt": "ab", "demo": "y" * 90}, {"prompt": "a", "demo": "y"}], chat, limit=20
    )
    assert [chat.text(ids) for ids in batch.responses()] == ["y" * 16, "y<|end|>"]
    assert batch.length_B.tolist() == [20, 5]


def new_context(tmp_path: Path) -> Context:
    return Context(name="s", work=tmp_path, inputs={}, threads=1)


class On:
    """Settings with `on_long` alone."""

    def __init__(self, on_long: str) -> None:
        self.on_long = on_long


@pytest.fixture
def chat(make_model: Callable[..., LanguageModel]) -> Chat:
    """32 positions; a message has two tokens around it, <|user|> and <|assistant|>."""
    return chat_of(make_model(positions=32))


def row(prompt: str, **fields: Any) -> dict[str, Any]:
    return {"id": ID, "domain": "d", "prompt": prompt, **fields}


def test_a_prompt_loses_the_beginning_of_its_longest_message(chat: Chat, tmp_path: Path) -> None:
    ctx = new_context(tmp_path)
    readers = [Reader(name="m", chat=chat)]
    plain = row("0123456789" * 3)
    talk = [
        {"role": "user", "content": "abcdefghijklmnop"},
        {"role": "assistant", "content": "z"},
        {"role": "user", "content": "?"},
    ]
    rows = {"d": [plain, row("talk", messages=talk), row("fits")]}
    kept = fit_prompts(rows, On("truncate"), ctx, readers, new_tokens=12)["d"]
    # Verifiers and people still read the whole prompt.
    assert kept[0]["prompt"] == plain["prompt"]
    assert kept[0]["messages"] == [{"role": "user", "content": plain["prompt"][-18:]}]
    assert len(chat.prompt(kept[0]["messages"])) == 20
    # <|user|> ... <|assistant|>z<|end|><|user|>?<|assistant|>: 7 tokens beside the long message.
    assert kept[1]["messages"] == [talk[0] | {"content": "defghijklmnop"}, *talk[1:]]
    assert kept[2] is rows["d"][2]
    assert talk[0]["content"] == "abcdefghijklmnop"
    (text,) = read_warnings(tmp_path)
    assert "cuts the beginning of the longest message of 2 of 3 rows (d)" in text
    system = row("a", messages=[{"role": "system", "content": "s" * 40}, talk[2]])
    with pytest.raises(ConfigError, match=r"a row does not fit.*on_long = .drop. for.* shortens"):
        fit_prompts({"d": [system]}, On("truncate"), ctx, readers, new_tokens=4)


def test_a_demonstration_behind_a_prompt_that_fills_all_positions(
    chat: Chat, tmp_path: Path
) -> None:
    ctx, readers = new_context(tmp_path), [Reader(name="m", chat=chat)]
    rows = {"d": [row("p" * 60, demo="abcd"), row("p" * 28, demo="abcd")]}
    kept = fit_demos(rows, On("truncate"), ctx, readers)["d"]
    batch = demo_batch(kept, chat, limit=cut_to(On("truncate"), readers))
    assert (
        "cuts the end, or the beginning of a long prompt, of 2 of 2 rows"
        in (read_warnings(ctx.work)[0])
    )
    # The whole demonstration where the prompt is cut anyway; else what is left for it.
    assert [chat.text(ids) for ids in batch.responses()] == ["abcd<|end|>", "ab"]
    assert batch.length_B.tolist() == [32, 32]


def test_the_smallest_reader_counts_and_hints_are_read(chat: Chat, tmp_path: Path) -> None:
    ctx = new_context(tmp_path)
    hint = {"d": "{prompt} because {answer}"}
    teacher = Reader(name="teacher 't'", chat=chat, hints=hint, domains=frozenset(["d"]))
    readers = [Reader(name="the student", chat=chat, positions=64), teacher]
    rows = {"d": [row("12345", answer="67890")], "e": [row("x" * 40) | {"domain": "e"}]}
    # <|user|>12345 because 67890<|assistant|>: 21 tokens for the teacher.
    assert fit_prompts(rows, On("error"), ctx, readers, new_tokens=11) == rows
    with pytest.raises(ConfigError, match=r"1 of 2 rows.* 32 positions of teacher 't'.*21 tokens"):
        fit_prompts(rows, On("error"), ctx, readers, new_tokens=12)
    (short,) = fit_prompts(rows, On("truncate"), ctx, readers, new_tokens=13)["d"]
    assert short["messages"] == [{"role": "user", "content": "345"}]
    with pytest.raises(
        ConfigError, match=r"max_new_tokens = 32 leaves no room.*teacher 't' has 32"
    ):
        fit_prompts(rows, On("drop"), ctx, readers, new_tokens=32)


def test_all_responses_of_a_row_are_looked_at(chat: Chat, tmp_path: Path) -> None:
    ctx, readers = new_context(tmp_path), [Reader(name="m", chat=chat)]
    rows = {"d": [row("ab", chosen="c", rejected="d" * 28), row("ab", response="e")]}
    fields = ("chosen", "rejected", "response")
    with pytest.raises(ConfigError, match=r"1 of 2 rows.*33 tokens, prompt and response"):
        fit_responses(rows, On("error"), ctx, readers, fields=fields)
    kept = fit_responses(rows, On("drop"), ctx, readers, fields=fields)
    assert kept == {"d": rows["d"][1:]}


def test_short_rows_are_not_encoded(
    make_model: Callable[..., LanguageModel], tmp_path: Path
) -> None:
    """With thousands of positions a look at the length of the text is enough."""
    chat = chat_of(make_model(positions=4096))
    rows = {"d": [row("p" * 50, demo="e" * 50), row("p" * 3000, demo="e" * 1200)]}
    with pytest.raises(ConfigError, match="1 of 2 rows"):
        fit_demos(rows, On("error"), new_context(tmp_path), [Reader(name="m", chat=chat)])
    assert [key for key, _ in chat._prompts if len(key) == 50] == []


@pytest.mark.parametrize("kind", ["dpo", "reward_model"])
def test_pairs(
    kind: str, run_stage: RunStage, models: Inputs, pairs: Callable[..., Inputs]
) -> None:
    inputs = {"start": models["start"], **pairs(rejected="z" * 70)}
    settings = {"steps": 2, "batch_size": 4}
    with pytest.raises(ConfigError, match=rf"1 of 61 rows.* 64 positions.*'{ID}'"):
        run_stage(kind, settings, inputs)
    for how in ("drop", "truncate"):
        ran = run_stage(kind, {"epochs": 1, "batch_size": 61, "on_long": how}, inputs)
        assert f'"{how}"' in told(ran) and " 1 of 61 rows" in told(ran)
        assert ran.metrics["loss"] > 0


def test_the_reference_reads_the_pairs_as_well(
    run_stage: RunStage, models: Inputs, pairs: Callable[..., Inputs], small: Callable[..., str]
) -> None:
    inputs = {"start": models["start"], "reference": small(40), **pairs(chosen="z" * 40)}
    for how in ("truncate", "drop"):
        ran = run_stage("dpo", {"epochs": 1, "batch_size": 61, "on_long": how}, inputs)
        assert "40 positions of the reference" in told(ran)
    with pytest.raises(ConfigError, match="40 positions of the reference"):
        run_stage("dpo", {"steps": 1, "loss": "kto"}, inputs)


def test_kto_measures_its_baseline_on_what_fits(
    run_stage: RunStage, models: Inputs, pairs: Callable[..., Inputs]
) -> None:
    """Each row fits; a long prompt with the long response to another one would not."""
    inputs = {"start": models["start"], **pairs(prompt="p" * 45, chosen="z", rejected="y")}
    pairs(prompt="q", chosen="z" * 45)
    ran = run_stage("dpo", {"epochs": 1, "batch_size": 62, "loss": "kto"}, inputs)
    assert ran.metrics["loss"] > 0


def test_critic_and_judge_are_readers_of_rl(
    run_stage: RunStage, models: Inputs, short: Callable[..., Inputs], small: Callable[..., str]
) -> None:
    start = {"start": models["start"], **short()}
    ppo = STEPS | {"group_size": 2, "advantage": "gae", "max_new_tokens": 30}
    with pytest.raises(ConfigError, match=r"36 positions of the critic"):
        run_stage("rl", ppo, start | {"critic": small(36)})
    judge = {"judge": "scalar", "model": "judges.rm"}
    judged = STEPS | {"group_size": 2, "reward": judge, "max_new_tokens": 20}
    with pytest.raises(ConfigError, match=r"30 positions of the reward model 'rm'"):
        run_stage("rl", judged, start | {"judges.rm": small(30, scalar=True)})
    # <|user|>short abc<|assistant|> are 11 tokens; 20 more, and the end that a cut response gets.
    run_stage("rl", judged, start | {"judges.rm": small(32, scalar=True)})


def test_score_looks_at_the_rollouts(
    run_stage: RunStage, models: Inputs, short: Callable[..., Inputs], small: Callable[..., str]
) -> None:
    domains = short()
    given = {"max_new_tokens": 12, "num_prompts": 8, "routes": {"short": ["one"]}}
    sampled = run_stage("sample", given, {"models.one": models["one"], **domains})
    rollouts = rows_of(sampled.out / "rollouts.jsonl")
    inputs = {"rollouts": str(sampled.out), "judges.rm": small(16, scalar=True), **domains}
    settings: dict[str, Any] = {"judge": {"judge": "scalar", "model": "judges.rm"}}
    # 11 tokens of the prompt, the response with its end, and the room for one more.
    long = [len(one["response"]) + 1 > 4 for one in rollouts]
    assert 0 < sum(long) < len(long)
    with pytest.raises(ConfigError, match=rf"{sum(long)} of 32 rows"):
        run_stage("score", settings, inputs)
    dropped = run_stage("score", settings | {"on_long": "drop"}, inputs)
    kept = [one["response"] for one in rows_of(dropped.out / "rollouts.jsonl")]
    fitting = [one["response"] for one, out in zip(rollouts, long, strict=True) if not out]
    assert kept == fitting
    cut = run_stage("score", settings | {"on_long": "truncate"}, inputs)
    assert len(rows_of(cut.out / "rollouts.jsonl")) == 32
    # Prompts alone are too long here: 11 tokens, and one of the response.
    inputs["judges.rm"] = small(10, scalar=True)
    shorter = run_stage("score", settings | {"on_long": "truncate"}, inputs)
    for one in rows_of(shorter.out / "rollouts.jsonl"):
        (message,) = one["messages"]
        assert one["prompt"].endswith(message["content"]) and len(message["content"]) < 9
    with pytest.raises(ConfigError, match="positions of the reward model 'rm'"):
        run_stage("pairs", settings | {"how": "all"}, inputs)


def test_auxiliary_rows_count_as_well(
    run_stage: RunStage, models: Inputs, short: Callable[..., Inputs], data: str
) -> None:
    rows = rows_of(Path(data) / "data.jsonl")
    write(Path(data) / "data.jsonl", [*rows, rows[0] | {"id": ID, "demo": "z" * 90}])
    inputs = {"start": models["start"], "aux.old": data, **short()}
    settings = STEPS | {"group_size": 2, "aux": {"old": {"weight": 1.0, "batch_size": 61}}}
    with pytest.raises(ConfigError, match=rf"1 of 61 rows.*'{ID}'"):
        run_stage("rl", settings, inputs)
    for how in ("drop", "truncate"):
        assert "1 of 61" in told(run_stage("rl", settings | {"on_long": how}, inputs))


def test_a_chat_without_weights_is_that_of_the_model(
    models: Inputs, small: Callable[..., str]
) -> None:
    for path in (models["start"], small(40), small(40, scalar=True)):
        chat = read_chat(path)
        assert chat.max_positions == (64 if path == models["start"] else 40)
        assert chat.prompt("ab") == read_chat(models["start"]).prompt("ab")
    assert torch.tensor(read_chat(models["start"]).stop_ids).max() > 4


def test_the_setting_is_no_part_of_an_identity_until_it_is_used() -> None:
    plain = build_config("sft", "s", {"steps": 1}).to_json(defaults=False)
    assert not {"on_long", "loss_on"} & set(plain)
    with pytest.raises(ConfigError, match=r"on_long.*'skip'"):
        build_config("sft", "s", {"steps": 1, "on_long": "skip"})
