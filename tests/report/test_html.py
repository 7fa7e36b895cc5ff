"""The page: self-contained, well formed, escaped, legible in both modes, complete."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from posttrain.engine import ancestry
from posttrain.engine.graph import Graph, Node
from posttrain.engine.record import Artifact
from posttrain.engine.store import Store
from posttrain.engine.work import add_warning
from posttrain.report import html
from posttrain.report.html import report_is_current, write_report

VOID = {"meta", "br", "hr", "img", "input", "link", "col", "wbr"}
LOADING = {"src", "href", "xlink:href", "srcset", "action", "data", "poster", "background"}
SVG = "{http://www.w3.org/2000/svg}"


class Page(HTMLParser):
    """Reads a page strictly: every tag has to be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.data: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], "unclosed tags"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.data.append(data)

    @property
    def words(self) -> str:
        """All text with single spaces."""
        return " ".join(" ".join(self.data).split())


def values(page: Page, attribute: str, tag: str | None = None) -> list[str]:
    return [v for t, a, v in page.attributes if a == attribute and tag in (None, t)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, store: Store, finished: Artifact) -> Path:
    target = tmp_path_factory.mktemp("page") / "made" / "report.html"
    return write_report(target, store=store, artifact=finished, recipe="mopd", seed=7)


@pytest.fixture(scope="module")
def page(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_nothing_is_loaded_from_anywhere(page: Page):
    loaded = [(t, a, v) for t, a, v in page.attributes if a in LOADING]
    assert loaded
    assert [entry for entry in loaded if not entry[2].startswith("#")] == []
    assert {"script", "link", "img", "iframe", "object"}.isdisjoint(page.tags)
    assert re.findall(r"@import|url\((?!#)", page.text) == []
    addresses = set(re.findall(r"https?://[^\s\"'<>]+", page.text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_every_reference_has_its_one_target(page: Page):
    ids = Counter(values(page, "id"))
    assert [name for name, count in ids.items() if count > 1] == []
    wanted = {v[1:] for t, a, v in page.attributes if a in LOADING}
    wanted |= set(re.findall(r"url\(#([^)]+)\)", page.text))
    assert wanted <= set(ids)
    assert {"results", "forgetting", "training", "lineage"} <= wanted


def test_drawings_are_well_formed_and_named(page: Page):
    drawings = re.findall(r"<svg.*?</svg>", page.text, flags=re.DOTALL)
    roots = [ElementTree.fromstring(text) for text in drawings]
    named = [root.get("aria-label") for root in roots if root.get("role") == "img"]
    assert len(named) == len(set(named)) > 15
    assert "Reverse KL over steps: add, letters, reverse, spiral" in named
    assert all(root.get("aria-hidden") == "true" for root in roots if root.get("role") != "img")


def test_plots_follow_the_colours_and_font_of_the_page(page: Page):
    figures = re.findall(r"<figure>.*?</figure>", page.text, flags=re.DOTALL)
    assert figures
    for figure in figures:
        assert re.findall(r"#[0-9a-f]{6}\b", figure) == []
        assert "font-family" not in figure
        assert "<style" not in figure
    assert {"var(--ink)", "var(--c1)", "var(--c4)"} <= set(
        re.findall(r"var\(--\w+\)", "".join(figures))
    )
    drawn = {name for value in values(page, "class") for name in value.split()}
    styled = set(
        re.findall(r"\.([a-z-]+)", (Path(html.__file__).parent / "report.css").read_text())
    )
    assert {"grid", "axis", "curve", "interval", "init", "teacher", "student"} <= drawn & styled


def test_sections_are_all_there(page: Page):
    for name in (
        *("results", "forgetting", "training", "lineage", "transcripts", "settings"),
        "provenance",
    ):
        assert name in values(page, "id", "section")
        assert f"#{name}" in values(page, "href", "a")
    for text in ("Reverse KL", "Reward", "Entropy", "Response length", "Clip share", "mask share"):
        assert text in page.words


def test_text_of_models_and_data_is_escaped(page: Page):
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert "<script>alert('prompt')</script> & \"quotes\"" in page.words
    assert "-4 <b>student</b>" in page.words


def test_results_table(page: Page, scores: Callable[..., dict[str, Any]]):
    result = scores()
    table = page.text[page.text.index('<table class="results">') :]
    table = table[: table.index("</table>")]
    for row in result["domains"].values():
        for cells in (row, row["greedy"]):
            for model in ("init", "teacher", "student"):
                assert f">{100 * cells[model]['value']:.1f}<" in table
            assert f">{cells['recovery']['value']:.2f}<" in table
    for decoding in (result, result["greedy"]):
        assert f">{decoding['norm']:.2f}<" in table
        assert f">{decoding['min_recovery']:.2f}<" in table
    assert Counter(re.findall(r"<(td|th)\b", table))["td"] > 40


def test_headline(page: Page, scores: Callable[..., dict[str, Any]]):
    tiles = re.findall(r"<dt>(.*?)</dt>\s*<dd>(.*?)<", page.text)
    assert ("Norm, temperature 1", f"{scores()['norm']:.2f}") in tiles
    # Sixteen stages take 3.25 s, 6.5 s, ... = 3.25 * 136 s.
    assert ("Time, all stages", "7 min 22 s") in tiles
    assert "seed 7" in page.words
    assert "4 domains</small>" not in page.text


def test_specialists_own_domain_is_marked_in_the_matrix(page: Page):
    table = page.text[page.text.index('<table class="matrix">') :]
    rows = re.findall(r'<tr class="(\w+)">(.*?)</tr>', table, flags=re.DOTALL)
    assert [role for role, _ in rows] == ["init", *["teacher"] * 4, "student"]
    for place, (_, row) in enumerate(rows[1:5]):
        cells = re.findall(r"<td class=\"([^\"]*)\"", row)
        assert ["own" in cell.split() for cell in cells] == [n == place for n in range(4)]


def test_transcripts_show_the_teacher_of_the_domain_and_marks(page: Page):
    block = re.findall(r'<details class="domain".*?</details>', page.text, flags=re.DOTALL)
    assert len(block) == 4
    assert "reverse_teacher" in block[2]
    assert "spiral_teacher" not in block[2]
    marks = Counter(re.findall(r'<div class="answer ([\w-]+)">', block[2]))
    # Four problems, three models, two decodings; sampled answers are right in every other one.
    assert sum(marks.values()) == 24
    assert marks["partly-right"] == 1
    assert marks["right"] > marks["wrong"] > 4


def test_lineage_has_every_stage_with_its_fingerprint_and_number(
    page: Page, store: Store, finished: Artifact
):
    drawing = re.search(r'<svg[^>]*class="lineage".*?</svg>', page.text, flags=re.DOTALL)
    assert drawing is not None
    root = ElementTree.fromstring(drawing[0])
    cards = [g for g in root.iter(f"{SVG}g") if "card" in (g.get("class") or "")]
    assert len(cards) == 12
    texts = {
        text.text: [t.text for t in card.iter(f"{SVG}text")]
        for card in cards
        for text in card.iter(f"{SVG}text")
        if text.get("class") == "name"
    }
    for ancestor in ancestry.lineage(store, finished):
        record = ancestor.record
        if record["kind"] != "domain":
            assert record["fingerprint"][:8] in texts[record["name"]]
    assert texts["student"][-1].startswith("KL 0.0")
    assert texts["evaluation"][-1].startswith("Norm 0.8")
    said = [title.text for title in root.iter(f"{SVG}title")]
    assert "add_teacher is teachers.add_teacher of student" in said
    assert sum(" is start of " in str(text) for text in said) == 10


def test_settings_and_provenance(page: Page):
    for text in (
        *("student.steps=120", "4f2a9c1d7e6b5a4930281f1e2d3c4b5a69788796", "workbench"),
        *("torch 2.13.0", "with uncommitted changes", "2026-10-03 09:14 UTC", "routes.add"),
    ):
        assert text in page.words


def test_meta_tag_says_which_artifact(path: Path, finished: Artifact, tmp_path: Path):
    assert report_is_current(path, finished.fingerprint)
    assert not report_is_current(path, "0" * 64)
    assert not report_is_current(tmp_path / "nothing.html", finished.fingerprint)


def test_a_page_of_another_layout_is_not_current(
    path: Path, finished: Artifact, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(html, "LAYOUT", html.LAYOUT + 1)
    assert not report_is_current(path, finished.fingerprint)


def test_same_page_every_time(path: Path, store: Store, finished: Artifact, tmp_path: Path):
    again = write_report(
        tmp_path / "again.html", store=store, artifact=finished, recipe="mopd", seed=7
    )
    assert again.read_bytes() == path.read_bytes()
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_page_about_a_model(store: Store, finished: Artifact, tmp_path: Path):
    path = write_report(
        tmp_path / "r.html", store=store, artifact=store.resolve("student"), recipe="r", seed=0
    )
    page = Page(path.read_text(encoding="utf-8"))
    found = values(page, "id", "section")
    assert found == ["training", "lineage", "settings", "provenance"]
    assert "#results" not in values(page, "href")


def test_warnings_of_recipe_and_stages_come_first(store: Store, tmp_path: Path):
    place = Store(tmp_path / "store")
    node = Node(name="kept", kind="select")
    graph = Graph(nodes={"kept": node}, target="kept")
    work = place.begin(graph.fingerprints()["kept"])
    add_warning(work.path, "no row of <b> is kept")
    # As of what was adopted: nobody timed it.
    made = place.commit(node, work, inputs={}, metrics={}, provenance={"source": "elsewhere"})
    path = write_report(
        tmp_path / "r.html",
        store=place,
        artifact=made,
        recipe="r",
        seed=0,
        warnings=[{"stage": None, "text": "stage left is not made"}],
    )
    page = Page(path.read_text(encoding="utf-8"))
    assert values(page, "id", "section")[0] == "warnings"
    assert "recipe stage left is not made kept no row of <b> is kept" in page.words


def test_page_about_a_domain(store: Store, finished: Artifact, tmp_path: Path):
    path = write_report(
        tmp_path / "r.html", store=store, artifact=store.resolve("add"), recipe="r", seed=0
    )
    assert "add" in Page(path.read_text(encoding="utf-8")).words


def test_page_without_teachers_or_transcripts(
    empty_store: Store, tmp_path: Path, scores: Callable[..., dict[str, Any]], commit: Any
):
    nodes = {
        "base": Node(name="base", kind="pretrain", config={"steps": 9}),
        "e": Node(name="e", kind="evaluate", inputs={"student": "base", "init": "base"}),
    }
    found = commit(
        empty_store, Graph(nodes=nodes, target="e"), scores=scores(routed=False), transcripts={}
    )
    path = write_report(
        tmp_path / "r.html",
        store=empty_store,
        artifact=found,
        recipe="<i>r</i>",
        seed=0,
        seconds=3.0,
    )
    page = Page(path.read_text(encoding="utf-8"))
    assert "i" not in page.tags
    assert "Recovery" not in page.words
    assert "transcripts" not in values(page, "id", "section")
    assert "3.0 s" in page.words


def test_suppressed_recovery_is_a_dash_with_its_reason(
    empty_store: Store,
    tmp_path: Path,
    scores: Callable[..., dict[str, Any]],
    commit: Any,
    graph: Graph,
):
    found = commit(empty_store, graph, scores=scores(flat="letters"), transcripts={})
    path = write_report(tmp_path / "r.html", store=empty_store, artifact=found, recipe="r", seed=0)
    page = Page(path.read_text(encoding="utf-8"))
    assert page.text.count('<td class="recovery none">—</td>') == 2
    assert "letters: no recovery, teacher and init cannot be told apart" in page.words
    # Two tiles and two cells of the table.
    assert page.text.count("<small>3 of 4 domains</small>") == 4


def test_half_a_character_is_written_out(store: Store, tmp_path: Path):
    """JSON can hold one half of a pair, which no encoding can write."""
    path = write_report(
        tmp_path / "r.html",
        store=store,
        artifact=store.resolve("student"),
        recipe="r",
        seed=0,
        warnings=[{"stage": None, "text": "half \ud83d of it"}],
    )
    assert r"half \ud83d of it" in path.read_text(encoding="utf-8")
