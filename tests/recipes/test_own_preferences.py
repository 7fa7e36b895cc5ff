"""r.preferences and r.table: whose data they are, what is refused, and a recipe run to its end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain.algorithms import BradleyTerry, Dpo
from posttrain.engine.errors import ConfigError, GraphError
from posttrain.engine.record import SHORT, Artifact
from posttrain.language.handles import Stage
from posttrain.recipe import Recipe
from posttrain.suites.data_table import DataTable
from posttrain.suites.domain import Domain, Suite, Table, VerifierSpec
from posttrain.suites.preferences import Preferences

STEPS: dict[str, Any] = {"steps": 2, "warmup_steps": 1, "batch_size": 4, "lr": 1e-3}
Rows = list[dict[str, Any]]


def write(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def talk(prompt: str, *said: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate((prompt, *said))]


@pytest.fixture
def new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recipe]:
    """A builder over a suite of one domain, preferences `helpful` (pairs with margins), `ranked`
    and `thumbs` (single rows), and the table `chat`; the working directory has `more.jsonl`."""
    home, here = tmp_path / "suite", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    numbers = [{"prompt": f"n {i}", "answer": str(i), "demo": str(i)} for i in range(100, 200)]
    write(home / "numbers.jsonl", numbers)
    pairs = [
        {"prompt": f"n {i}", "chosen": str(i), "rejected": "no", "gap": i / 100} for i in range(20)
    ]
    write(home / "pairs.jsonl", pairs)
    ranked = [{"prompt": f"n {i}", "all": [str(i), f"n {i}", "no"]} for i in range(20)]
    write(home / "ranked.jsonl", ranked)
    thumbs = [{"prompt": f"n {i}", "response": str(i), "label": i % 3 > 0} for i in range(20)]
    write(home / "thumbs.jsonl", thumbs)
    write(home / "chat.jsonl", [{"messages": talk(f"n {i}", str(i), "n", "n")} for i in range(9)])
    write(here / "more.jsonl", [{"prompt": f"{i} n", "demo": str(i)} for i in range(9)])
    suite = Suite(
        name="mine",
        domains={
            "numbers": Domain(
                name="numbers",
                source=Table(train="numbers.jsonl", demo="demo"),
                verifier=VerifierSpec(name="exact"),
            )
        },
        preferences={
            "helpful": Preferences(data="pairs.jsonl", margin="gap"),
            "ranked": Preferences(data="ranked.jsonl", responses="all"),
            "thumbs": Preferences(data="thumbs.jsonl", label="label"),
        },
        tables={"chat": DataTable(data="chat.jsonl", messages="messages")},
    )

    def make() -> Recipe:
        return Recipe(suite, home)

    return make


def start(r: Recipe) -> Stage:
    size = {"hidden_size": 32, "num_layers": 1, "intermediate_size": 64}
    return r.pretrain(data=r.demos("numbers"), steps=3, batch_size=8, **size)


@pytest.mark.slow
def test_a_recipe_on_own_data_runs_to_its_end(
    new: Callable[..., Recipe], execute: Callable[[Recipe, Stage], dict[str, Artifact]]
) -> None:
    r = new()
    chat, more = r.table("chat"), r.table("more.jsonl")
    mix = r.mix({chat: 0.5, r.demos("numbers"): 0.5})
    s = r.sft(start=start(r), data=mix, aux={"more": (r.dedup(more), 0.5)}, **STEPS)
    s = r.sft(start=s, data=chat, name="plain", **STEPS)
    helpful = r.preferences("helpful")
    loss = BradleyTerry(margins="margin")
    first = r.reward_model(start=s, data=helpful, loss=loss, **STEPS)
    judge = r.reward_model(
        start=first, data=r.preferences("ranked"), per_prompt=True, name="ranks", **STEPS
    )
    s = r.dpo(start=s, data=helpful, loss=Dpo(nll_weight=0.1), **STEPS)
    kto = r.dpo(start=s, data=r.preferences("thumbs"), loss="kto", name="kto", **STEPS)
    limits = {"max_new_tokens": 2, "num_problems": 2, "samples": 1, "bootstrap": 100}
    execute(r, judge)
    found = execute(r, r.evaluate(kto, init=s, **limits))
    assert 0 < found["ranks"].metrics["loss"] < 2
    assert found["helpful"].metrics == {
        **{"rows": 20, "read": 20, "duplicates": 0, "prompts": 20, "contradictions": 0},
        **{"median": 6, "longest": 7},
    }
    assert found["helpful"].inputs == {} and found["helpful"].kind == "preferences"
    assert found["dpo"].inputs["data"]["fingerprint"] == found["helpful"].fingerprint
    card = (found["dpo"].path / "README.md").read_text()
    assert f"| helpful | preferences | `{found['helpful'].fingerprint[:SHORT]}` |" in card
    assert 0 < found["kto"].metrics["loss"] < 1
    rows = [json.loads(line) for line in (found["mix"].path / "data.jsonl").open()]
    assert {row["domain"] for row in rows} == {"chat", "numbers"}
    assert all(("messages" in row) == (row["domain"] == "chat") for row in rows)


def test_what_teaches_nothing_is_told(
    new: Callable[..., Recipe], execute: Callable[[Recipe, Stage], dict[str, Artifact]]
) -> None:
    both = [{"prompt": "p", "chosen": a, "rejected": b} for a, b in ("xy", "yx", "xz")]
    write(Path("both.jsonl"), both)
    good = [{"prompt": "p", "response": a, "label": 1} for a in "xy"]
    write(Path("good.jsonl"), good)
    for file, text in {
        "both": "contradictions, pairs of responses that are preferred both ways: 1;",
        "good": "all 2 responses are desirable",
    }.items():
        r = new()
        columns = {"label": "label"} if file == "good" else {}
        stage = r.preferences(f"{file}.jsonl", **columns)
        (told,) = execute(r, stage)[file].record["warnings"]
        assert told.startswith(f"{file}: {text}")


@pytest.mark.slow
def test_a_base_from_a_table(
    new: Callable[..., Recipe], execute: Callable[[Recipe, Stage], dict[str, Artifact]]
) -> None:
    """With every character of its conversations, and their roles."""
    talks = [talk(f"é {i}", "ü", "ö", "ß") for i in range(9)]
    write(Path("talks.jsonl"), [{"messages": messages} for messages in talks])
    r = new()
    size = {"hidden_size": 32, "num_layers": 1, "intermediate_size": 64}
    table = r.table("talks.jsonl", messages="messages")
    base = execute(r, r.pretrain(data=table, steps=2, batch_size=4, **size))["base"]
    tokens = (base.path / "tokenizer.json").read_text(encoding="utf-8")
    assert all(f'"{letter}"' in tokens for letter in "éüöß")
    with pytest.raises(ConfigError, match=r"\(pretrain\), field 'demo_noise': 0.5 is not read"):
        r.pretrain(data=table, steps=2, demo_noise=0.5, name="noisy")


def test_a_name_or_a_place(new: Callable[..., Recipe]) -> None:
    """The same table under the same name is one stage; another name makes another one."""
    r = new()
    helpful = r.preferences("helpful")
    assert helpful == r.preferences("helpful") == Stage("helpful", "preferences", ("helpful",))
    named = r.preferences("helpful", name="kind")
    assert named == Stage("kind", "preferences", ("kind",))
    more = r.table("more.jsonl", prompt="prompt", demo="demo")
    assert more == Stage("more", "table", ("more",))
    assert r.table(Path("more.jsonl").absolute(), prompt="prompt", demo="demo") == more
    with pytest.raises(GraphError, match="two stages are called 'more'"):
        r.table("more.jsonl", system="Be brief.")
    write(Path("My Pairs.v2.jsonl"), [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    assert r.preferences("My Pairs.v2.jsonl").name == "my_pairs"


def test_the_domains_of_what_is_made_of_it(new: Callable[..., Recipe]) -> None:
    r = new()
    mixed = r.mix({r.table("chat"): 1, r.demos("numbers"): 1})
    assert set(mixed.domains) == {"chat", "numbers"}
    base = start(r)
    with pytest.raises(ConfigError, match=r"domain_shares.*'helpfull' is not one of the domains"):
        r.dpo(start=base, data=r.preferences("helpful"), domain_shares={"helpfull": 1}, **STEPS)
    r.dpo(
        start=base, data=r.preferences("helpful"), domain_shares={"helpful": 1}, name="a", **STEPS
    )


def test_moving_a_file_or_naming_defaults_changes_no_fingerprint(
    new: Callable[..., Recipe],
) -> None:
    def prints(r: Recipe, source: str) -> str:
        stage = r.table(source, name="same")
        return r.graph(stage).fingerprints()["same"]

    before = prints(new(), "more.jsonl")
    Path("more.jsonl").rename("moved.jsonl")
    assert prints(new(), "moved.jsonl") == before
    with Path("moved.jsonl").open("a") as file:
        file.write('{"prompt": "p", "demo": "d"}\n')
    assert prints(new(), "moved.jsonl") != before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r, b: r.preferences("helpfull"), "no preferences of that name; did you mean 'help"),
        (lambda r, b: r.preferences("chat"), r"'chat' stands among the tables.*r.table\('chat'\)"),
        (lambda r, b: r.table("helpful"), r"r.preferences\('helpful'\)"),
        (lambda r, b: r.table("numbers"), r"'numbers' is a domain; write r.demos\('numbers'\)"),
        (lambda r, b: r.preferences("pair.jsonl"), r"pair.jsonl does not exist"),
        (lambda r, b: r.preferences("helpful", chosen="a"), "its columns stand in suite 'mine'"),
        (lambda r, b: r.table("more.jsonl", promt="a"), "unknown option 'promt'; did you mean 'pr"),
        (lambda r, b: r.table("more.jsonl", prompt=3), "prompt = 3; it takes the name of a column"),
        (lambda r, b: r.table("more.jsonl", name="numbers"), "'numbers' is a domain of suite"),
        (lambda r, b: r.table("more.jsonl", name="More"), "may only hold the characters a-z, 0-9"),
        (lambda r, b: r.table(["more.jsonl"]), "it takes a name of the suite's tables, or where"),
        (lambda r, b: r.table("more.jsonl", demo="no"), "line 1: column 'no' is missing"),
        (
            lambda r, b: r.dpo(start=b, data="more.jsonl", **STEPS),
            r"its data is 'more.jsonl'; it needs preferences: .*r.preferences\('more.jsonl'\)",
        ),
        (
            lambda r, b: r.dpo(start=b, data=r.demos("numbers"), **STEPS),
            r"it needs preferences: data=r.preferences\(...\) of your own, or data=r.pairs\(",
        ),
        (
            lambda r, b: r.reward_model(start=b, data="x", **STEPS),
            r"stage 'reward_model' \(reward_model\): its data is 'x'; .*r.preferences\('x'\)",
        ),
        (
            lambda r, b: r.dpo(start=b, data=r.table("chat"), **STEPS),
            r"its data is 'chat' \(table\); it needs preferences",
        ),
        (
            lambda r, b: r.sft(start=b, data="more.jsonl", **STEPS),
            r"its data is 'more.jsonl'; it needs .*a table of your own is r.table\('more.jsonl'\)",
        ),
        (
            lambda r, b: r.sft(start=b, data=r.preferences("helpful"), **STEPS),
            r"its data is 'helpful' \(preferences\); it needs r.demos\(...\) or a stage of kind ta",
        ),
        (
            lambda r, b: r.dedup("more.jsonl"),
            r"its data is 'more.jsonl'; .*r.table\('more.jsonl'\)",
        ),
        (
            lambda r, b: r.mix({"more.jsonl": 1.0}),
            r"its data is 'more.jsonl'; .*r.table\('more.jsonl'\)",
        ),
        (
            lambda r, b: r.rl(start=b, prompts=r.table("chat"), **STEPS),
            r"its prompts are 'chat' \(table\)",
        ),
    ],
)
def test_mistakes_are_refused_with_the_fix(
    new: Callable[..., Recipe], call: Callable[..., Any], message: str
) -> None:
    r = new()
    base = start(r)
    with pytest.raises(ConfigError, match=message):
        call(r, base)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda r, b: r.dpo(start=b, data=r.preferences("thumbs"), **STEPS),
            "field 'loss': dpo learns from pairs, and 'thumbs' are single responses.*loss='kto'",
        ),
        (
            lambda r, b: r.reward_model(start=b, data=r.preferences("thumbs"), **STEPS),
            r"it learns from pairs, and 'thumbs' are single.*r.dpo\(loss='kto'\)",
        ),
        (
            lambda r, b: r.reward_model(
                start=b,
                data=r.preferences("ranked"),
                loss=BradleyTerry(margins="margin"),
                **STEPS,
            ),
            "'ranked' does not say the margin of a preference; name its column with margin = ",
        ),
        (
            lambda r, b: r.reward_model(
                start=b,
                data=r.preferences("helpful"),
                loss=BradleyTerry(margins="strength"),
                **STEPS,
            ),
            "'helpful' does not say the strength of a preference; name its column with strength",
        ),
        (
            lambda r, b: r.reward_model(
                start=b,
                data=r.pairs(r.sample(b, prompts=r.prompts("numbers"))),
                loss=BradleyTerry(margins="margin"),
                **STEPS,
            ),
            "those of 'pairs' are not paired by score",
        ),
    ],
)
def test_forms_that_a_loss_cannot_read_are_refused(
    new: Callable[..., Recipe], call: Callable[..., Any], message: str
) -> None:
    r = new()
    target = call(r, start(r))
    with pytest.raises(ConfigError, match=message):
        r.graph(target)


def test_margins_that_nobody_reads_are_told(new: Callable[..., Recipe]) -> None:
    def warned(**loss: Any) -> list[str]:
        r = new()
        r.graph(r.reward_model(start=start(r), data=r.preferences("helpful"), **STEPS | loss))
        return [w.text for w in r.warnings if w.stage == "helpful"]

    assert warned(loss=BradleyTerry(margins="margin")) == []
    (text,) = warned()
    assert "margin = 'gap' of 'helpful' is read by no stage" in text
