"""Domains that tests build."""

import dataclasses
import json

from posttrain.suites.build import build_domain
from posttrain.suites.domain import (
    Domain,
    Procedural,
    Table,
    VerifierSpec,
    domain_node,
)

SPLITS = ("train", "validation", "heldout")


def sums(**changes):
    source = Procedural(
        dataset="chain_sum",
        params={"max_terms": 3, "max_digits": 2},
        num_train=300,
        num_validation=40,
        num_heldout=60,
        seed=3,
    )
    return Domain(
        name="sums",
        source=dataclasses.replace(source, **changes),
        verifier=VerifierSpec(name="reasoning_gym:chain_sum"),
    )


def table(verifier="exact", options=None, **fields):
    return Domain(
        name="mine",
        source=Table(**fields),
        verifier=VerifierSpec(name=verifier, options=options or {}),
    )


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.name


def numbered(count, start=0):
    return [
        {"prompt": f"problem {n}", "answer": str(n), "steps": f"so {n}"}
        for n in range(start, start + count)
    ]


def build(domain, base, out):
    node = domain_node(domain, base)
    out.mkdir(parents=True)
    metrics = build_domain(node.config, node.runtime, out, node.data)
    rows = {
        split: [json.loads(line) for line in (out / f"{split}.jsonl").read_text().splitlines()]
        for split in SPLITS
    }
    return metrics, rows
