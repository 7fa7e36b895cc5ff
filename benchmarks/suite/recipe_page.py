"""docs/recipes.md: every recipe in one line, with its source, result and lineage picture."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from posttrain.engine.store import Store
from posttrain.language.loader import shipped_recipes
from posttrain.report.gather import domain_colours, gather
from posttrain.report.lineage import lineage_svg

DOCS = Path(__file__).resolve().parents[2] / "docs"
PICTURES = DOCS / "recipes"
LABELS = {
    "In one line:": r"(`[^`]*`)",
    "Source:": r"(.*?)(?=^In one line:)",
    "Left out:": r"(.*)",
}
"""Label in a recipe's docstring -> what stands behind it."""

STYLE = """
svg { --ink: #1b1f24; --muted: #59636e; --line: #d8dee4; --soft: #f5f7f9;
  --c1: #1f68b3; --c2: #c2410c; --c3: #15803d; --c4: #8b3fa8;
  --c5: #946200; --c6: #0e7490; --c7: #be2a72; --c8: #566270;
  background: #ffffff; font-family: system-ui, "Segoe UI", "Liberation Sans", sans-serif; }
.edge { fill: none; }
path.start { stroke: var(--ink); stroke-width: 1.6; }
path.teachers { stroke: var(--ink); stroke-width: 1.4; stroke-dasharray: 5 3; }
path.reads { stroke: var(--muted); stroke-width: 1; stroke-dasharray: 1.5 3; }
.card rect { fill: var(--soft); stroke: var(--line); }
.card text { fill: var(--muted); font-size: 11px; }
.card .name { fill: var(--ink); font-size: 13px; font-weight: 600; }
.card .print { font-family: "Liberation Mono", Consolas, monospace; }
.card .key { fill: var(--ink); text-anchor: end; }
"""

HEAD = """# Recipes

Every file in `src/posttrain/recipes/`, run as it is on the built-in suite by `make recipes`. Read a
recipe's own file for what it does: it is shorter than any description.

In the notation `a → b` b starts from a's checkpoint, `base →` starts from the base again, `D@m` is
data sampled by m, `{…}` are parallel branches, `rl[v]` is reinforcement learning on reward v,
`opd{…}` is on-policy distillation from those teachers, `for r` is a loop.

Time is from `posttrain run NAME` to its report, with the shared base in the store; stages that
another recipe or an earlier run had made are told as "there". The gain is that of the last model
over the checkpoint that it is compared with, its SFT where it has one, in points of accuracy at
temperature 1 on held-out problems, mean over domains, with the 95 % interval of a bootstrap over
problems. One seed. A recipe without a row has not been measured as it stands.

"""


def write_page(rows: dict[str, Any]) -> None:
    """Write docs/recipes.md from the recipes' docstrings and the newest results."""
    names = shipped_recipes()
    parts = [HEAD, markdown({n: rows[n] for n in names if n in rows}), "\n"]
    for name, path in names.items():
        said = described(path)
        parts.append(f"\n## {name}\n\n{said['summary']}\n\n")
        # Fenced, since brackets before parentheses would be read as a link.
        parts.append(f"```text\n{said.pop('In one line:', '').strip('`')}\n```\n\n")
        parts += [f"- {label} {said[label]}\n" for label in LABELS if said.get(label)]
        if (PICTURES / f"{name}.svg").exists():
            parts.append(f"\n![Lineage of {name}](recipes/{name}.svg)\n")
    (DOCS / "recipes.md").write_text("".join(parts), encoding="utf-8")


def described(path: Path) -> dict[str, str]:
    """Summary and labelled paragraphs of a recipe's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    found = {"summary": text.partition("\n")[0]}
    for label, pattern in LABELS.items():
        paragraph = re.search(rf"^{label} {pattern}", text, re.DOTALL | re.MULTILINE)
        if paragraph:
            found[label] = " ".join(paragraph.group(1).split())
    return found


def markdown(rows: dict[str, Any]) -> str:
    """The table of results."""
    lines = [
        "| recipe | stages | time | gain over its SFT, points | beats it | Norm |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in sorted(rows.items()):
        gain = row["gain"]
        verdict = "yes" if gain["low"] > 0 else "no" if gain["high"] < 0 else "not told apart"
        interval = f"{100 * gain['low']:+.1f} to {100 * gain['high']:+.1f}"
        found = len(row["cached"])
        # Where all were there, the time is that of the run that made them.
        stages = f"{row['stages']}, {found} there" if 0 < found < row["stages"] else row["stages"]
        norm = "" if row["norm"] is None else f"{row['norm']:.2f}"
        lines.append(
            f"| [{name}](#{name}) | {stages} | {row['seconds']:.0f} s "
            f"| {100 * gain['value']:+.1f} ({interval}) | {verdict} | {norm} |"
        )
    machines = {
        f"{row['machine']['cpu']}, {row['machine']['cores']} cores, {row['date']}"
        for row in rows.values()
    }
    return "\n".join([*lines, "", "Measured on: " + "; ".join(sorted(machines)) + "."])


def write_picture(name: str, folder: Path, artifact: str) -> None:
    """The lineage of a recipe's evaluation as a picture that stands by itself."""
    store = Store(folder)
    stages = gather(store, store.resolve(Path(artifact).name))
    svg = lineage_svg(stages, domain_colours(stages))
    end = svg.index(">") + 1
    PICTURES.mkdir(exist_ok=True)
    picture = f"{svg[:end]}<style>{STYLE}</style>{svg[end:]}\n"
    (PICTURES / f"{name}.svg").write_text(picture, encoding="utf-8")
