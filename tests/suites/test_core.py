"""The built-in suite: no problem is asked in two splits, in whatever words."""

import json

from posttrain.suites.domain import SPLITS, build_domain, domain_node, split_of
from posttrain.suites.formats import find_format
from posttrain.suites.load import load_suite


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
