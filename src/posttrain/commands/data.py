"""What `plan` and `run` tell of the tables that a recipe reads, before anything is computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from posttrain.commands.io import plain_table
from posttrain.engine.errors import ConfigError, PosttrainError
from posttrain.engine.fingerprint import digest, file_digest
from posttrain.engine.graph import Graph, Node
from posttrain.engine.store import Store
from posttrain.suites.cells import spread
from posttrain.suites.checked import memory_of, recall, remember, tables_of
from posttrain.suites.data_table import TABLE
from posttrain.suites.own_data import TableKind
from posttrain.suites.preferences import PREFERENCES

if TYPE_CHECKING:  # a wheel of some size, needed for tables alone
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"
TOGETHER = 1000
"""Rows that are counted at a time."""
OWN: Mapping[str, TableKind] = {kind.name: kind for kind in (PREFERENCES, TABLE)}
"""Kinds of tables that are no domain."""
NOT_OWN = ("further_demos", "validation", "heldout")
"""What these have none of."""
TOLD = {
    "no_demo": (
        "row with an empty demonstration or none",
        "rows with an empty demonstration or none",
    ),
    "contradicting": ("prompt with several answers", "prompts with several answers"),
    "left_out": ("value of other columns left out", "values of other columns left out"),
    "tied": ("ranking without a preference", "rankings without a preference"),
    "contradictions": ("contradiction", "contradictions"),
}
"""What there may be to tell of rows, and its words for one and for more."""


def told(graph: Graph, names: Sequence[str], store: Store) -> list[dict[str, Any]]:
    """What there is to tell of the tables among these stages: what their rows call their `domain`,
    the `kind` of stage, the facts of `posttrain.suites.checked`, and the `unit` of its lengths.

    Of a table that is no domain all rows are in `train`: pairs, where it holds preferences. What
    there is to tell of a table on the Hub is known once it was read; before, `rows` is None.
    """
    tokenizer = _tokenizer(graph, names)
    fingerprints = graph.fingerprints()
    found = []
    for name in names:
        node = graph.nodes[name]
        if node.kind in OWN:
            facts = _own(node, store, fingerprints[name])
        elif node.kind == "domain" and node.config["source"]["kind"] == "table":
            facts = dict(node.runtime["facts"]) or _built(store, fingerprints[name])
        else:
            continue
        line = {"domain": name, "kind": node.kind, "rows": None, "unit": "characters"} | facts
        counted = None if tokenizer is None or not facts else _tokens(node, tokenizer, store)
        found.append(line if counted is None else line | counted | {"unit": "tokens"})
    return found


def all_read(lines: Sequence[Mapping[str, Any]]) -> bool:
    """Whether there is nothing left to be told of these."""
    return all(line["rows"] is not None for line in lines)


def shown(lines: Sequence[Mapping[str, Any]]) -> Group:
    """The same for people: a table, and a line for each domain with something to tell."""
    table = plain_table(
        *("data", "rows", "repeats", "more demos", "train", "validation", "heldout"),
        *("median", "longest"),
    )
    more: list[Text] = []
    names = ("rows", "duplicates", "further_demos", "train", "validation", "heldout", "median")
    for line in lines:
        if line["rows"] is None:
            table.add_row(line["domain"], Text("read from the Hub when it is built", "dim"))
            continue
        notes = [f"{line[k]:,} {words[line[k] > 1]}" for k, words in TOLD.items() if line.get(k)]
        if notes:
            more.append(Text(f"{line['domain']}: {', '.join(notes)}", "yellow"))
        without = NOT_OWN if line["kind"] in OWN else ()
        cells = ["" if key in without else f"{line[key]:,}" for key in names]
        longest = f"{line['longest']:,} {line['unit']}"
        table.add_row(line["domain"], *cells, longest)
    return Group(table, *more)


def _own(node: Node, store: Store, fingerprint: str) -> dict[str, Any]:
    """The facts of a table that is no domain; {} where it was not read yet."""
    artifact = store.find(fingerprint)
    facts = node.runtime.get("facts") or ({} if artifact is None else artifact.record["metrics"])
    if not facts:
        return {}
    rest = {key: value for key, value in facts.items() if key not in ("rows", "read")}
    nothing = dict.fromkeys(NOT_OWN, 0)
    return {"rows": facts["read"], "train": facts["rows"]} | nothing | rest


def _built(store: Store, fingerprint: str) -> dict[str, Any]:
    """The facts of a domain that is in the store; {} where it is not."""
    artifact = store.find(fingerprint)
    metrics = {} if artifact is None else artifact.record["metrics"]
    names = ("rows", "duplicates", "further_demos", "train", "validation", "heldout", *TOLD)
    wanted = (*names, "median", "longest")
    return {key: metrics[key] for key in wanted} if set(wanted) <= set(metrics) else {}


def _tokenizer(graph: Graph, names: Sequence[str]) -> Path | None:
    """The tokenizer of the checkpoints from outside, where they have one and the same."""
    nodes = (graph.nodes[name] for name in names)
    # A GGUF file has no directory of its own.
    places = (node.runtime.get("directory") for node in nodes if node.kind == "model")
    there = [file for place in places if place and (file := Path(place) / TOKENIZER).is_file()]
    return there[0] if len({file_digest(file) for file in there}) == 1 else None


def _tokens(node: Node, tokenizer: Path, store: Store) -> dict[str, int] | None:
    """Longest and median row in tokens, without what the chat template puts around them.

    None where the tokenizer or a table cannot be read here: whoever needs it says so.
    """
    if node.kind in OWN:
        tables = digest([node.config, node.data])
    else:
        tables = memory_of(node.config["source"], node.config["verifier"]["name"], node.data)
    name = f"tokens-{digest([tables, file_digest(tokenizer)])[:32]}"
    known = recall(store.cache, name)
    here = all(table in node.data for table in node.runtime.get("files", ("table",)))
    if known is None and here:
        known = _counted(node, tokenizer)
        if known is not None:
            remember(store.cache, name, known)
    return known


def _counted(node: Node, file: Path) -> dict[str, int] | None:
    from tokenizers import Tokenizer

    try:
        reader = Tokenizer.from_file(str(file))
    # What it raises is an Exception and no more.
    except Exception:
        return None
    try:
        if node.kind in OWN:
            texts = iter(OWN[node.kind].texts(node.config, node.runtime["file"]))
        else:
            rows = tables_of(node.config, node.runtime["files"]).new_rows()
            texts = (row.text for row in rows)
        return spread(_lengths(reader, texts))
    except PosttrainError:
        return None


def _lengths(reader: Tokenizer, texts: Iterator[str]) -> Iterator[int]:
    while some := list(islice(texts, TOGETHER)):
        try:
            encodings = reader.encode_batch(some, add_special_tokens=False)
        except Exception as error:
            raise ConfigError(f"the tokenizer does not encode these texts: {error}") from error
        yield from (len(encoded.ids) for encoded in encodings)
