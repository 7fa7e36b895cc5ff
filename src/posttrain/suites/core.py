"""The built-in suite: four procedural domains that a model of 0.2 million parameters can learn.

The problems and their scoring are reasoning-gym's; the compact text is ours
(`posttrain.rewards.formats`). The domains ask for different circuits (running sums, reversal,
ordering, counting and mirroring), no constant answer does well in any of them, and each can be
learned well within a minute on one core once a model specialises, but not all four at once: which
is the situation that specialists and their distillation are for.

Each domain can also be thought about: the format's `thought` writes the steps down, `direct` is the
answer that they lead to.
"""

from __future__ import annotations

from posttrain.rewards.formats import FORMATS
from posttrain.rewards.spec import VerifierSpec
from posttrain.suites.domain import Domain, Procedural, Suite


def suite() -> Suite:
    """The suite `core`."""
    domains = (
        _domain("add", "chain_sum", 3000, min_terms=2, max_terms=3, min_digits=1, max_digits=1),
        _domain("reverse", "spell_backward", 12000, min_word_len=5, max_word_len=10),
        _domain(
            "sort",
            "number_sorting",
            12000,
            min_numbers=8,
            max_numbers=12,
            min_decimals=0,
            max_decimals=0,
            min_value=0,
            max_value=9,
        ),
        _domain("palindrome", "palindrome_generation", 8000, min_length=4, max_length=8),
    )
    return Suite(name="core", domains={domain.name: domain for domain in domains})


def _domain(name: str, dataset: str, num_train: int, **params: int) -> Domain:
    return Domain(
        name=name,
        source=Procedural(
            dataset=dataset,
            params=params,
            format=name,
            format_version=FORMATS[name].version,
            num_train=num_train,
            num_validation=400,
            num_heldout=500,
            seed=0,
        ),
        verifier=VerifierSpec(name=f"reasoning_gym:{dataset}", options={}),
    )
