"""Which curves are shown, with which colours, and how long ones are thinned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from posttrain.engine.record import Artifact
from posttrain.engine.store import Store
from posttrain.report.curves import INK, MAX_POINTS, Panel, Section, sections
from posttrain.report.gather import StageFacts, domain_colours, gather


def stage(
    name: str, kind: str, lines: list[dict[str, float]], domains: str = "", **config: Any
) -> StageFacts:
    record: Mapping[str, Any] = {
        "name": name,
        "kind": kind,
        "fingerprint": name * 9,
        "config": config,
    }
    edges = {f"domains.{domain}": f"{domain}-0" for domain in domains.split()}
    return StageFacts(record=record, edges=edges, lines=lines)


def lines(count: int, **values: Any) -> list[dict[str, float]]:
    """Lines of metrics; a value may be a function of the step."""
    return [
        {"step": n, "total": count, "tokens": n, "seconds": n}
        | {key: value(n) if callable(value) else value for key, value in values.items()}
        for n in range(1, count + 1)
    ]


def only(found: list[Section]) -> Section:
    assert len(found) == 1
    return found[0]


def panel(section: Section, key: str) -> Panel:
    return next(p for p in section.panels + section.folded if p.key == key)


def test_a_whole_run(store: Store, finished: Artifact):
    stages = gather(store, finished)
    found = sections(stages, domain_colours(stages))
    assert [section.title for section in found] == [
        "Supervised stages",
        "Reinforcement learning",
        "Distillation: student",
    ]
    supervised, rl, distill = found
    assert [p.key for p in supervised.panels] == ["loss"]
    assert len(panel(supervised, "loss").lines) == 6
    assert [p.key for p in rl.panels] == ["reward", "entropy", "response_length", "clip_share"]
    assert {"lr", "grad_norm", "clip_low", "train_fraction"} <= {p.key for p in rl.folded}
    assert rl.folded_constant == ["finished 0.98"]
    assert rl.constant == ["mask share 0"]
    labels = [line.label for line in panel(distill, "kl").lines]
    assert labels == ["add", "letters", "reverse", "spiral"]
    assert [line.colour for line in panel(distill, "kl").lines] == [1, 2, 3, 4]
    assert panel(distill, "kl").log


def test_specialists_have_the_colour_of_their_domain():
    stages = [
        stage("rev", "rl", lines(5, reward=lambda n: n), "reverse"),
        stage("add", "rl", lines(5, reward=lambda n: 2 * n), "add"),
        stage("both", "rl", lines(5, reward=lambda n: 3 * n), "add reverse"),
    ]
    found = panel(only(sections(stages, {"add": 1, "reverse": 2})), "reward").lines
    assert {line.label: line.colour for line in found} == {"rev": 2, "add": 1, "both": INK}


def test_stages_of_one_domain_differ_by_their_dashes():
    stages = [stage(f"r{n}", "rl", lines(5, reward=lambda n: n), "add") for n in range(3)]
    found = panel(only(sections(stages, {"add": 1})), "reward").lines
    assert [line.dash for line in found] == [0, 1, 2]


def test_clip_share_is_the_sum_of_both_ends():
    stages = [stage("r", "rl", lines(3, clip_low=lambda n: 0.01 * n, clip_high=0.5), "add")]
    found = panel(only(sections(stages, {"add": 1})), "clip_share").lines[0]
    assert found.y == pytest.approx([0.51, 0.52, 0.53])


def test_rows_of_a_teacher_have_the_colour_of_its_domain():
    values = {"rows/t": lambda n: n, "rows/self": lambda n: 2 * n}
    stages = [stage("d", "distill", lines(3, **values), "add", routes={"add": "t"})]
    found = panel(only(sections(stages, {"add": 5})), "rows").lines
    assert {line.label: line.colour for line in found} == {"t": 5, "self": INK}


def test_parts_of_a_reward_stand_beside_the_whole():
    values = {"reward": lambda n: n, "reward/length": lambda n: 2 * n, "reward/judge": lambda n: -n}
    found = panel(
        only(sections([stage("r", "rl", lines(3, **values), "add")], {"add": 1})), "reward"
    )
    assert [(line.label, line.dash) for line in found.lines] == [
        ("all", 0),
        ("length", 1),
        ("judge", 2),
    ]
    assert {line.colour for line in found.lines} == {INK}


def test_preference_stages_share_their_panels():
    values = {"loss": lambda n: 1 / n, "accuracy": lambda n: n / 5, "nll": lambda n: n}
    stages = [stage(name, "dpo", lines(5, **values)) for name in ("first", "second")]
    found = only(sections(stages, {}))
    assert found.title == "Preference stages"
    assert [p.key for p in found.panels] == ["loss", "accuracy"]
    assert [p.key for p in found.folded] == ["nll"]
    assert [line.label for line in panel(found, "accuracy").lines] == ["first", "second"]
    assert panel(found, "loss").hint == "mean over pairs; over responses with kto"


def test_reward_models_have_a_section_of_their_own():
    values = {"loss": lambda n: 1 / n, "accuracy": lambda n: n / 5, "reward_std": lambda n: n}
    stages = [stage(name, "reward_model", lines(5, **values)) for name in ("helpful", "safe")]
    found = only(sections(stages, {}))
    assert found.title == "Reward models"
    assert [p.key for p in found.panels] == ["loss", "accuracy"]
    assert [p.title for p in found.folded] == ["Spread of the rewards"]
    assert [line.label for line in panel(found, "accuracy").lines] == ["helpful", "safe"]
    assert panel(found, "loss").hint == "mean over pairs; over prompts with per_prompt"


def test_steps_in_which_a_domain_was_not_drawn_are_left_out():
    rows = lines(3, **{"kl/add": lambda n: n, "kl/rev": lambda n: n})
    del rows[1]["kl/rev"]
    found = panel(
        only(sections([stage("d", "distill", rows, "add rev")], {"add": 1, "rev": 2})), "kl"
    )
    assert [line.x for line in found.lines] == [[1, 2, 3], [1, 3]]


def test_long_curves_become_means_of_neighbours():
    """1000 points in groups of nine: the first is the mean of 1 to 9."""
    stages = [stage("s", "sft", lines(1000, loss=lambda n: float(n)))]
    line = panel(only(sections(stages, {})), "loss").lines[0]
    assert len(line.x) == -(-1000 // 9) <= MAX_POINTS
    assert (line.x[0], line.y[0]) == (5, 5)
    assert (line.x[-1], line.y[-1]) == (1000, 1000)


def test_log_scale_only_for_a_wide_range_of_positive_values():
    for low, log in ((0.01, True), (0.5, False), (0.0, False)):
        stages = [stage("s", "sft", lines(3, loss=lambda n, low=low: low if n == 2 else 1.0))]
        assert panel(only(sections(stages, {})), "loss").log is log


def test_unknown_metrics_are_shown_under_their_own_name():
    found = only(sections([stage("r", "rl", lines(3, zeal=lambda n: n), "add")], {"add": 1}))
    assert [(p.key, p.title) for p in found.folded] == [("zeal", "zeal")]


def test_each_setting_with_a_schedule_has_a_panel_of_its_own():
    """Their units differ. Entries of one setting share its panel; several stages do, too."""
    values = {
        "setting/temperature": lambda n: n,
        "setting/domain_shares/add": lambda n: 2 * n,
        "setting/domain_shares/sort": lambda n: 3 * n,
    }
    stages = [stage("r", "rl", lines(3, **values), "add sort")]
    section = only(sections(stages, {"add": 1, "sort": 2}))
    assert panel(section, "setting/temperature").title == "Setting temperature"
    found = panel(section, "setting/domain_shares").lines
    assert {line.label: line.colour for line in found} == {"add": 1, "sort": 2}
    one, other = (stage(n, "rl", lines(3, **values), n) for n in ("add", "sort"))
    both = panel(only(sections([one, other], {"add": 1, "sort": 2})), "setting/temperature")
    assert [line.label for line in both.lines] == ["add", "sort"]


def test_accuracy_of_rl_is_no_preference():
    found = only(sections([stage("r", "rl", lines(3, accuracy=lambda n: n), "add")], {"add": 1}))
    assert panel(found, "accuracy").title == "Accuracy"
    found = only(sections([stage("d", "dpo", lines(3, accuracy=lambda n: n), "add")], {"add": 1}))
    assert panel(found, "accuracy").title == "Preference accuracy"


def test_stages_without_curves_have_no_section():
    one_line = stage("s", "sft", lines(1, loss=1.0))
    assert sections([one_line, stage("e", "evaluate", lines(6))], {}) == []
