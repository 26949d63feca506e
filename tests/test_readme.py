"""The README says what is there: its names, its links, its numbers, its length."""

import pkgutil
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "experiments" / "results"


def section(title):
    """The text under a heading, down to the next heading of its level or above."""
    body = README.split(f"\n{title}\n", 1)[1]
    return re.split(rf"\n#{{1,{title.index(' ')}}} ", body)[0]


@pytest.mark.parametrize("page", ["README.md", "experiments/README.md", "data/LICENSES.md"])
def test_every_link_leads_to_a_file(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    places = [place for place in re.findall(r"\]\(([^)]+)\)", text) if "://" not in place]
    headings = ["#" + re.sub(r"[^a-z -]", "", title.lower()).replace(" ", "-")
                for title in re.findall(r"\n#+ (.+)", text)]
    here = (ROOT / page).parent
    assert [p for p in places if p not in headings and not (here / p).exists()] == []
    assert len(places) > 5 or page != "README.md"


def test_every_name_of_the_map_is_in_the_code():
    names = re.findall(r"`([a-z_]+)\.(?!py\b)([A-Za-z_.]+)", section("## Read it beside the paper"))
    assert len([pkgutil.resolve_name(".".join(name)) for name in names]) > 20    # imports them


def test_tables_are_the_ones_that_the_script_wrote():
    """Row by row, so that no number in the README is of another base than the result it cites."""
    rows = [line for line in section("## What the base does").splitlines() if line[:1] == "|"]
    written = (RESULTS / "quality.md").read_text(encoding="utf-8").splitlines()
    assert len(rows) > 10 and [row for row in rows if row not in written] == []


@pytest.mark.parametrize("pattern, file, written", [
    (r"(\d+ and \d+) %", "one_shot.md", r"\| {} \|"),            # of the way to a style
    (r"([\d,]+ images: [\d.]+)", "losses.md", r"\| {} \|"),
    (r"among 100 in (.+?) %", "base.md", r"\| openmoji \| {} %"),
    (r"in another style in (.+?) %", "base.md", r"openmoji in held-out styles \|[^|]+\| {} % \|")])
def test_figures_in_the_text_are_the_ones_that_the_scripts_wrote(pattern, file, written):
    figures = [re.escape(figure.replace(" and ", ", ").replace(" images: ", " | "))
               for figure in re.findall(pattern, README)]
    text = (RESULTS / file).read_text(encoding="utf-8")
    assert figures and [f for f in figures if not re.search(written.format(f), text)] == []


def test_the_main_job_says_what_is_shown():
    shown = section("## Two commands").split("```")[3].strip().splitlines()
    said = (RESULTS / "main_job.md").read_text(encoding="utf-8").splitlines()
    assert len(shown) == 5 and [line for line in shown if line not in said] == []


def test_the_map_comes_early():
    """The length of the whole: test_budgets.py."""
    before, after = README.split("## Read it beside the paper")
    assert len(before.split()) < 700 and "## Your own style" in after
