"""What the pages say is there: names, links, commands and figures."""

import pkgutil
import re
import shlex
from pathlib import Path

import pytest
import torch

import sample
import train
from pretrain import clip, muse, superres, vqgan
from styledrop import ROUND_1, ROUND_2, SAMPLING, SUPERRES, SUPERRES_SAMPLING, StyleDrop

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", "experiments/README.md", "data/LICENSES.md", "docs/differences.md",
         "examples/README.md"]
STAGES = {"pretrain.vqgan": vqgan, "pretrain.clip": clip, "pretrain.muse": muse,
          "pretrain.superres": superres}


def section(title):
    """The text under a heading, down to the next one."""
    return README.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def blocks(text):
    """The code blocks of a page."""
    return re.findall(r"```(?:python)?\n(.+?)\n```", text, re.DOTALL)


def commands():
    """Every `python ...` line of the README's blocks, as a list of words without comments."""
    lines = [line for block in blocks(README) for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("python ")]


# -- links and names

@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    places = re.findall(r"\]\(([^)]+)\)", text)
    headings = ["#" + re.sub(r"[^a-z -]", "", title.lower()).replace(" ", "-")
                for title in re.findall(r"\n#+ (.+)", text)]
    missing = [place for place in places if "://" not in place and place not in headings
               and not ((ROOT / page).parent / place).exists()]
    assert missing == []
    if page == "README.md":
        assert len(places) > 5


def test_every_name_in_the_map_is_in_the_code():
    names = re.findall(r"`([a-z_]+\.(?!py\b)[A-Za-z_.0-9]+)`", section("The paper in the code"))
    assert len(names) > 30
    for name in names:
        pkgutil.resolve_name(name)                           # imports it


# -- commands

def runnable():
    """The commands that are this repository's scripts."""
    return [words[1:] for words in commands() if words[1] in ("train.py", "sample.py")]


def test_the_commands_run_in_their_order(cli, weights2, picture, tmp_path):
    """With toy weights, two steps and a small pool, in one folder, as a user would type them."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    picture("my_picture.png")
    (tmp_path / "my_picture.png").rename(tmp_path / "my_picture.jpg")
    assert len(runnable()) > 5
    for script, *arguments in runnable():
        main = train.main
        more = ["--weights", weights2]
        if script == "sample.py":
            main = sample.main
            more += ["--steps", 2]
        else:
            more += ["--steps", 2, "--batch", 2]
        if "--rounds" in arguments:
            more += ["--pool", 1, "--pick", "1,2"]
        code, _, err = cli(main, *arguments, *more)
        assert code == 0, f"{script} {arguments}: {err}"


def test_the_stages_know_their_options(monkeypatch):
    """The commands of "Train a base" are read without an error; nothing is trained."""
    class Stop(Exception):
        pass

    def stop(args, **_):
        raise Stop

    found = [words[2:] for words in commands() if words[1] == "-m" and "pretrain" in words[2]]
    assert {words[0] for words in found} == set(STAGES)
    for name, *arguments in found:
        stage = STAGES[name]
        monkeypatch.setattr(stage, "start", stop)
        with pytest.raises(Stop):
            stage.main(arguments)


def test_the_python_block_runs(pipe2, monkeypatch, tmp_path):
    """With the toy base in place of the shipped one."""
    code, = re.findall(r"```python\n(.+?)\n```", README, re.DOTALL)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(StyleDrop, "load", lambda: pipe2)
    names = {}
    exec(code, names)
    side = pipe2.resolution
    assert names["pixels"].shape == (2, side, side, 3)
    assert (tmp_path / "ramparts.pt").exists()


# -- figures

def test_the_output_shown_is_the_one_measured():
    shown = blocks(section("Two commands"))[1].splitlines()
    said = (RESULTS / "main_job.md").read_text(encoding="utf-8").splitlines()
    assert len(shown) > 4
    assert [line for line in shown if line not in said] == []


def rows(text):
    """The rows of the tables of a page, without their headings."""
    lines = text.splitlines()
    return [line for line, next_line in zip(lines, [*lines[1:], ""])
            if line.startswith("|") and not line.startswith("|---")
            and not next_line.startswith("|---")]


@pytest.mark.parametrize("page, least", [("README.md", 6), ("experiments/README.md", 50)])
def test_tables_of_results_are_the_ones_that_scripts_wrote(page, least):
    """Row by row, so that no figure is of another base than the file that is cited for it."""
    text = section("Results")
    if page != "README.md":
        text = (ROOT / page).read_text(encoding="utf-8")
    cited = [RESULTS / Path(place).name for place in re.findall(r"results/[a-z_0-9]+\.md", text)]
    written = "\n".join(path.read_text(encoding="utf-8") for path in cited).splitlines()
    found = [row for row in rows(text) if "±" in row]
    assert len(found) >= least
    assert [row for row in found if row not in written] == []


def test_losses_in_the_text_are_those_of_the_logs():
    text = section("Train a base")
    pairs = re.findall(r"at ([\d.]+) after ([\d,]+)", text)
    pairs += re.findall(r"harder to predict: ([\d.]+) after ([\d,]+)", text)
    written = (RESULTS / "losses.md").read_text(encoding="utf-8")
    assert len(pairs) == 3
    for loss, images in pairs:
        assert f"| {images} | {loss} |" in written


def test_what_the_judge_can_name_is_what_its_file_says():
    text = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
    figures = re.findall(r"names (\d+) % as they are and (\d+) % in free styles, .+? names "
                         r"(\d+) and (\d+) %", text)
    judge = torch.load(ROOT / "experiments" / "object_judge.pt", weights_only=True)
    ceilings = judge["provenance"]["ceilings"]
    expected = [ceilings[f"{role} sets, {kind}"] for role in ("training", "held-out")
                for kind in ("as drawn", "free styles")]
    assert figures == [tuple(f"{100 * share:.0f}" for share in expected)]


def test_table_s3_is_the_code():
    """Ours before the brackets; the paper's values in them (tests/test_styledrop.py)."""
    table = {}
    for line in section("Ten differences from the paper").split("Table S3")[1].splitlines():
        cells = [cell.split("[")[0].strip() for cell in line.strip("|").split("|")]
        table[cells[0]] = cells[1:]
    stages = (ROUND_1, ROUND_2, SUPERRES)
    assert table["steps"] == [str(how.steps) for how in stages]
    assert [float(rate) for rate in table["learning rate"]] == [how.lr for how in stages]
    assert table["batch"] == [str(how.batch) for how in stages]
    assert table["H (the adapter's bottleneck width)"] == [str(how.d_prj) for how in stages]
    views = table["views (each reference itself and random crops of it)"]
    assert views == [str(how.views) for how in stages]
    shared = [{True: "yes", False: "no"}[how.is_shared] for how in stages]
    assert table["shared across depth"] == shared
    sampling = (SAMPLING, SAMPLING, SUPERRES_SAMPLING)
    for name, field in (("λ_A", "lambda_a"), ("λ_B", "lambda_b"), ("decoding steps", "steps"),
                        ("temperature", "temperature"),
                        ("min_p (see the differences above)", "min_p")):
        assert [float(cell) for cell in table[name]] == [getattr(how, field) for how in sampling]


def test_the_changes_to_try_are_those_that_were_measured():
    """Each row of the table, of a change in code, beside its row of foreign_sweep.md."""
    rows = {}
    text = (RESULTS / "foreign_sweep.md").read_text(encoding="utf-8")
    for line in text.split("\n## ")[0].splitlines():         # the second table has differences
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        name, _, value = cells[0].partition(" ")
        if name == "the":
            rows["none"] = cells
        elif value.replace(".", "").isdigit():
            rows[name, float(value)] = cells
    tried = [line for line in section("In Python").splitlines() if "%" in line]
    assert len(tried) >= 5
    for line in tried:
        change, kept, palette, _ = (cell.strip() for cell in line.strip("|").split("|"))
        key = "none"
        if change != key:
            name, value = re.search(r"(\w+)=([\w.-]+)", change).groups()
            key = name, float(value)
        measured = [cell.split(" ± ")[0] + " %" for cell in rows[key][1:3]]
        assert [kept, palette] == measured, change


def test_the_objects_to_ask_for_are_those_that_were_kept():
    report = (RESULTS / "foreign.md").read_text(encoding="utf-8")
    measured = re.findall(r"\| (an? \w+) \| (\d+) % \|", report.split("## Each object")[1])
    said = re.findall(r"(an? \w+) (?:only )?in (\d+) %", section("Your own picture"))
    assert len(said) == 8
    assert set(said) <= set(measured)


def test_the_share_of_parameters_is_the_one_that_train_prints():
    share, = re.findall(r"not shared: ([\d.]+) % of the parameters of G and T", README)
    assert f", {share}% of the base's" in (RESULTS / "main_job.md").read_text(encoding="utf-8")
