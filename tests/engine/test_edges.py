"""Names of edges: a role, or one of several with a role."""

from __future__ import annotations

from posttrain.engine.graph import edge_name, named, role_of, with_role

INPUTS = {
    "start": "base",
    "data": "rows",
    "data.0": "first",
    "aux.ptx.sums": "sums",
    "aux.own": "rows",
    "database.x": "other",
}


def test_a_name_is_made_and_taken_apart() -> None:
    assert edge_name("aux", "ptx", "sums") == "aux.ptx.sums"
    assert edge_name("start") == role_of("start") == "start"
    assert role_of("aux.ptx.sums") == "aux"


def test_inputs_are_found_by_role() -> None:
    assert named(INPUTS, "data") == {"0": "first"}
    assert named(INPUTS, "aux") == {"ptx.sums": "sums", "own": "rows"}
    assert named(INPUTS, edge_name("aux", "ptx")) == {"sums": "sums"}
    assert with_role(INPUTS, "data") == {"data": "rows", "data.0": "first"}
    assert list(with_role(INPUTS, "aux", "start")) == ["start", "aux.ptx.sums", "aux.own"]
