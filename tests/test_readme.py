"""The README says what is there: its names, its links, its numbers."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "experiments" / "results"


def section(title):
    """The text under a heading, down to the next heading of its level or above."""
    level, _ = title.split(" ", 1)
    body = README.split(f"\n{title}\n", 1)[1]
    return re.split(rf"\n#{{1,{len(level)}}} ", body)[0]


def test_every_link_leads_to_a_file():
    places = [place for place in re.findall(r"\]\(([^)]+)\)", README) if "://" not in place]
    headings = ["#" + re.sub(r"[^a-z -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"\n#+ (.+)", README)]
    assert len(places) > 10 and [p for p in places if p not in headings and not (ROOT / p).exists()] == []


def test_every_name_of_the_line_by_line_table_is_in_the_code():
    names = re.findall(r"`([a-z_]+)\.(?!py\b)([A-Za-z_.]+)", section("## The paper, line by line"))
    assert len(names) > 20
    for module, path in names:
        thing = importlib.import_module(module)
        for part in path.split("."):
            thing = getattr(thing, part)


@pytest.mark.parametrize("title, file", [("## Do rounds help?", "table2.md"), ("### Is my loss normal?", "losses.md")])
def test_tables_are_the_ones_that_the_scripts_wrote(title, file):
    """Row by row, so that no number in the README is of another base than the result it cites."""
    rows = [line for line in section(title).splitlines() if line.startswith("|")]
    written = (RESULTS / file).read_text(encoding="utf-8").splitlines()
    assert len(rows) > 10 and [row for row in rows if row not in written] == []
