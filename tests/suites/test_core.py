"""The built-in suite: no problem is asked in two splits, in whatever words."""

import dataclasses
import json

from posttrain.backends.prompting import in_modes
from posttrain.rewards.formats import find_format
from posttrain.rewards.verifiers import load_verifier
from posttrain.suites.build import build_domain
from posttrain.suites.domain import domain_node
from posttrain.suites.load import load_suite
from posttrain.suites.split import SPLITS, split_of


def test_no_core_problem_is_asked_again_in_another_split(tmp_path):
    """A problem is what its format's key says: permuted letters are one palindrome problem, and so
    are permuted digits that are to be sorted."""
    suite, directory = load_suite("core")
    for name, domain in suite.domains.items():
        node = domain_node(domain, directory)
        out = tmp_path / name
        out.mkdir()
        build_domain(node.config, node.runtime, out, node.data)
        text_format = find_format(domain.source.format, where=name)
        keys = {
            split: [
                text_format.key(json.loads(line)["meta"]["entry"])
                for line in (out / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
            ]
            for split in SPLITS
        }
        for split, found in keys.items():
            assert len(found) == domain.source.counts()[split] == len(set(found))
            assert all(split_of(key) == split for key in found)
    twins = [
        {"metadata": {"letters": list(letters)}, "question": letters}
        for letters in ("aabb", "baba")
    ]
    palindrome = find_format("palindrome", where="test")
    assert palindrome.key(twins[0]) == palindrome.key(twins[1])
    assert palindrome.prompt(twins[0]) != palindrome.prompt(twins[1])


def test_every_core_domain_thinks_and_answers_at_once(tmp_path):
    """Thought and direct answer as documented; both full demonstrations score 1."""
    suite, directory = load_suite("core")
    shown = {}
    for name, domain in suite.domains.items():
        source = dataclasses.replace(domain.source, num_train=60, num_validation=5, num_heldout=5)
        node = domain_node(dataclasses.replace(domain, source=source), directory)
        out = tmp_path / name
        out.mkdir()
        build_domain(node.config, node.runtime, out, node.data)
        verifier = load_verifier(out)
        rows = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
        for row in in_modes(rows, ("think", "no_think")):
            assert verifier.score(row["demo"], row) == 1.0
            # Room for prompt, tags and end in the 128 positions of a tiny model.
            assert len(row["prompt"]) + len(row["demo"]) < 100
        shown[name] = domain.source.format
    items = {
        "add": {"expression": "4 - 1 - 7"},
        "reverse": {"word": "monkey"},
        "sort": {
            "direction": "ascending",
            "original_numbers": list("50391"),
            "sorted_numbers": list("01359"),
        },
        "palindrome": {"letters": list("ccbaa")},
    }
    said = {
        name: (text_format.thought(item), text_format.direct(item))
        for name, text_format, item in (
            (n, find_format(f, where=n), {"metadata": items[n]}) for n, f in shown.items()
        )
    }
    assert said == {
        "add": ("4-1=3-7=-4", "-4"),
        "reverse": ("0m1o2n3k4e5y", "yeknom"),
        "sort": ("0111315191", "01359"),
        "palindrome": ("a2b1c2", "acbca"),
    }
