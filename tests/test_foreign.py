"""experiments/foreign.py and its two rulers: what the measures mean, and the commands at toy size.

style_measures.py says how near a picture is to a reference, object_judge.py what it shows.
"""

import csv
import functools
import json
import runpy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import generator, noise_images
from PIL import Image

import data
import styledrop
from experiments import foreign, object_judge, style_measures
from experiments.foreign import FOLDER, OBJECTS, Reference, columns_of
from experiments.style_measures import distances, is_blank, is_nearest, palette, texture, to_lab
from styledrop import RARE_TOKEN, ROUND_1, SAMPLING, StyleDrop

EXAMPLES = FOLDER.parent.parent / "examples"
LICENCES = {"public domain", "CC0-1.0", "CC-BY-2.0", "CC-BY-4.0", "CC-BY-SA-3.0", "CC-BY-SA-4.0",
            "MIT", "MIT or Apache-2.0", "BSD-2-Clause", "BSD-3-Clause"}


# -- the references

@pytest.fixture(scope="module")
def rows():
    """The rows of the table, which the experiment reads with the same settings."""
    with open(FOLDER / "table.tsv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def test_every_reference_has_a_file_words_and_a_licence(rows):
    """And no file is there twice, or without a row."""
    assert list(rows[0]) == ["file", "content", "style", "kind", "source", "licence", "used",
                             "note"]
    files = [row["file"] for row in rows]
    assert sorted(files) == sorted(path.name for path in FOLDER.glob("*.webp"))
    assert len(files) == len(set(files)) == len({(FOLDER / file).read_bytes() for file in files})
    for row in rows:
        assert row["licence"] in LICENCES and row["source"], row["file"]
        assert row["content"] and row["style"] and row["kind"], row["file"]
        with Image.open(FOLDER / row["file"]) as picture:
            assert picture.size == (256, 256) and picture.mode == "RGB", row["file"]


def test_the_split_is_the_random_one(rows):
    """The split is random: lot.py draws the same halves again, half of each kind."""
    drawn = runpy.run_path(str(FOLDER / "lot.py"))["draw"](rows)
    assert {row["file"]: row["used"] for row in rows} == drawn
    for kind in {row["kind"] for row in rows}:
        halves = [row["used"] for row in rows if row["kind"] == kind]
        assert halves.count("reported") - halves.count("chosen") in (0, 1), kind


def test_examples_are_references_that_are_only_reported(rows):
    """The same files, so what the README shows of them was not chosen either."""
    reported = {row["file"]: row for row in rows if row["used"] == "reported"}
    shared = [row for file, row in reported.items() if (EXAMPLES / file).exists()]
    assert len(shared) >= 4
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for row in shared:
        assert (EXAMPLES / row["file"]).read_bytes() == (FOLDER / row["file"]).read_bytes()
        line, = [line for line in text.splitlines() if line.startswith(f"| {row['file']} |")]
        assert f"| {row['style']} |" in line
    assert set(foreign.FIRST) <= set(reported)
    assert not [row["file"] for row in rows
                if row["used"] == "chosen" and (EXAMPLES / row["file"]).exists()]


def test_one_half_is_loaded(tmp_path, monkeypatch, picture):
    table = ["file\tcontent\tstyle\tkind\tused",
             'a.png\ta "cat\tflat\tink\tchosen', "b.png\ta house\toil\toil\treported",
             "c.png\tan owl\tin 3d\trender\tchosen"]
    (tmp_path / "table.tsv").write_text("\n".join(table) + "\n")
    paths = [picture(file, seed) for seed, file in enumerate(("a.png", "b.png", "c.png"))]
    monkeypatch.setattr(foreign, "FOLDER", tmp_path)
    first, last = foreign.load_references("chosen", 16)
    assert (first.file, first.content, first.style, first.kind, first.used) == (
        "a.png", 'a "cat', "flat", "ink", "chosen")
    assert last.file == "c.png"
    pixels = torch.tensor(data.read_reference(paths[2], 16)).permute(2, 0, 1)
    assert torch.allclose(last.picture, pixels / 127.5 - 1)
    assert [found.file for found in foreign.load_references("reported", 16)] == ["b.png"]


# -- style_measures.py

def plain(colour, side=16):
    """A picture (1, 3, side, side) of one sRGB colour, given in 0..255."""
    return (torch.tensor(colour) / 127.5 - 1).view(1, 3, 1, 1).expand(-1, -1, side, side).clone()


def shuffled(images, seed=0):
    """The same pixels at other places."""
    order = torch.randperm(images[0, 0].numel(), generator=generator(seed))
    return images.flatten(2)[..., order].view_as(images)


@pytest.mark.parametrize("colour, lab", [
    ((255, 255, 255), (100, 0, 0)), ((0, 0, 0), (0, 0, 0)), ((255, 0, 0), (53.24, 80.09, 67.20)),
    ((0, 255, 0), (87.73, -86.18, 83.18)), ((0, 0, 255), (32.30, 79.19, -107.86)),
    ((119, 119, 119), (50.03, 0, 0)), ((3, 3, 3), (0.82, 0, 0))])
def test_lab_of_known_colours(colour, lab):
    """White, red and so on of D65, as tables have them; the last one on the straight part."""
    assert (100 * to_lab(plain(colour, 1))).flatten().tolist() == pytest.approx(lab, abs=0.05)


def sliced(points, others, along):
    """Sliced Wasserstein distance of two (N, C), by the sorted projections of all points."""
    found = [np.abs(np.sort(points @ v) - np.sort(others @ v)).mean() for v in along]
    return np.mean(found)


def test_the_palette_distance_is_the_sliced_wasserstein_distance():
    """Of the pixels' colours in Lab, but for the 1 % at either end that quantiles leave out."""
    one, other = noise_images(2) * torch.tensor([1, 0.5]).view(2, 1, 1, 1)
    one, other = one[None], other[None]
    points = [to_lab(image).flatten(2)[0].T.double().numpy() for image in (one, other)]
    along = style_measures.directions(32, 3, 0).double().numpy()
    found = distances(palette(one), palette(other)).item()
    assert found == pytest.approx(sliced(*points, along), rel=0.03)

    many = np.random.default_rng(0).normal(size=(2000, 3))
    many /= np.linalg.norm(many, axis=1, keepdims=True)
    assert found == pytest.approx(sliced(*points, many), rel=0.15)       # 32 directions are few


def test_the_texture_distance_is_the_sliced_wasserstein_distance():
    """Of all patches of lightness and of colour, cut out one by one, without their means."""
    one, other = noise_images(1, 20), torch.rand(1, 3, 20, 20, generator=generator()) * 2 - 1
    expected, directions = [], style_measures.directions
    for planes, size, along in ((1, 7, directions(64, 49, 1)), (3, 5, directions(64, 75, 2))):
        points = []
        for image in (one, other):
            lab = to_lab(image)[0, :planes].double().numpy()
            starts = range(20 - size + 1)
            patches = [lab[:, y:y + size, x:x + size] for y in starts for x in starts]
            points.append(np.stack([(patch - patch.mean((1, 2), keepdims=True)).ravel()
                                    for patch in patches]))
        expected.append(sliced(*points, along.double().numpy()))
    assert distances(texture(one), texture(other)).item() == pytest.approx(np.mean(expected),
                                                                           rel=0.03)


def test_distances_are_symmetric_and_zero_to_itself():
    described = palette(noise_images(3))
    found = distances(described, described)
    assert found.shape == (3, 3) and torch.equal(found, found.T)
    assert (found.diagonal() == 0).all() and (found + torch.eye(3) > 0.01).all()
    assert distances(described[:1], described).shape == (1, 3)


def test_palettes_have_no_places_and_textures_do():
    """Its own pixels in another order: the same colours, but nothing like its patches."""
    image = noise_images(1, 32)
    assert distances(palette(image), palette(shuffled(image))).item() < 1e-6
    assert distances(texture(image), texture(shuffled(image))).item() > 0.02


def test_textures_have_no_mean_colour_and_palettes_do(monkeypatch):
    """Trap: a texture that measures the palette a second time."""
    monkeypatch.setattr(style_measures, "to_lab", lambda images: images)         # shifted in Lab
    image = noise_images(1, 16)
    other = image + torch.tensor([0.3, -0.2, 0.1]).view(1, 3, 1, 1)
    assert distances(texture(image), texture(other)).item() < 1e-6
    assert distances(palette(image), palette(other)).item() > 0.05
    assert distances(texture(image), texture(0.5 * image)).item() > 0.02         # its contrast


def test_nearest_is_nearer_to_the_first_than_to_every_other():
    red, dark_red, blue, grey = (palette(plain(colour)) for colour in (
        (255, 0, 0), (200, 0, 0), (0, 0, 255), (128, 128, 128)))
    asked = torch.cat([dark_red, blue, red])
    assert is_nearest(asked, torch.cat([red, blue, grey])).tolist() == [True, False, True]
    assert is_nearest(asked, torch.cat([grey, red, blue])).tolist() == [False] * 3
    assert is_nearest(asked, torch.cat([grey])).tolist() == [True] * 3


def with_square(side, value=-1.0, at=20):
    """White, 64 pixels a side, with a square of `side` pixels."""
    image = plain((255, 255, 255), 64)
    image[..., at:at + side, at:at + side] = value
    return image


@pytest.mark.parametrize("image, blank", [
    (plain((40, 90, 200), 64), True), (with_square(12), False), (with_square(8), True),
    (with_square(40), False), (with_square(40, 0.9), True),
    (torch.rand(1, 3, 64, 64, generator=generator()) * 2 - 1, False),
    (plain((128, 128, 128), 64) + 0.1 * torch.randn(1, 3, 64, 64, generator=generator()), True)],
    ids=["plain", "small object", "speck", "object", "faint object", "noise", "faint grain"])
def test_what_is_blank(image, blank):
    assert is_blank(image).tolist() == [blank]


# -- what a phrase may mean

NAMES = ["black-cat", "cat", "caterpillar", "automobile", "police-car", "carrot", "pear", "glass",
         "cocktail-glass", "house", "house-with-garden", "hot-beverage", "woman", "pineapple"]


@pytest.mark.parametrize("phrase, found", [
    ("a cat", "black-cat cat"), ("a car", "automobile police-car"),
    ("a house", "house house-with-garden"), ("a cocktail glass", "cocktail-glass"),
    ("two pears", "pear"), ("a cat in an umbrella", "black-cat cat"),
    ("a cup of coffee", "hot-beverage"), ("two women in a boat", "woman"), ("a pattern", ""),
    ("an apple", "")])
def test_the_names_that_a_phrase_may_mean(phrase, found):
    """Traps: caterpillars, carrots and pineapples; a glass where cocktails are meant; plurals."""
    columns = columns_of(phrase, NAMES)
    assert sorted(NAMES[column] for column in columns) == found.split()


def test_the_judge_can_be_asked_for_every_object():
    """No two objects share a class, or the wrong one would count as right."""
    columns = [set(columns_of(phrase, data.names())) for phrase in OBJECTS]
    assert all(columns) and sum(map(len, columns)) == len(set.union(*columns))


# -- the ruler

def judged(images):
    """A judge that goes by the top left corner: red is a cat, green a car, blue a house."""
    corner = images[:, :, 0, 0]                              # (B, 3)
    return torch.cat([corner, corner.amax(1, keepdim=True) * 0 - 0.5], 1)


JUDGED = ["cat", "automobile", "house", "owl"]               # black is an owl


@pytest.fixture
def fake_judge(monkeypatch):
    monkeypatch.setattr(foreign, "load_judge", lambda: (judged, JUDGED))


class PlainPipe:
    """A tokenizer of squares of 4 x 4 pixels in eight colours, which loses nothing of those."""

    device = torch.device("cpu")
    weights = torch.tensor([1, 2, 4]).view(1, 3, 1, 1)

    def __init__(self):
        self.vqgan = self

    def encode(self, images):
        return ((F.avg_pool2d(images, 4) > 0) * self.weights).sum(1)

    def decode(self, ids):
        bits = (ids[:, None] // self.weights) % 2
        return F.interpolate(bits * 2.0 - 1, scale_factor=4)


RED, GREEN, BLUE, WHITE, BLACK = 1, 2, 4, 7, 0


def painted(*ids):
    """A picture (3, 16, 16) of 16 coloured squares."""
    return PlainPipe().decode(torch.tensor(ids).view(1, 4, 4))[0]


HOUSE = painted(BLUE, *[RED] * 7, *[WHITE] * 8)              # the reference that shows a house
STRIPES = painted(*[BLACK, WHITE] * 8)
OTHER = painted(*[GREEN] * 12, *[BLACK] * 4)


def reference(content, picture, file="a.webp"):
    return Reference(file, content, "oil painting", "oil", "reported", picture)


@pytest.fixture
def ruler(fake_judge):
    return foreign.Ruler(PlainPipe(), [reference("a house", HOUSE), reference("a pattern", STRIPES),
                                       reference("a blob", OTHER)])


def test_rivals_are_the_own_reference_first_and_never_twice(fake_judge):
    references = [reference("a house", HOUSE)] * 25
    rivals = foreign.Ruler(PlainPipe(), references).rivals
    for i, found in enumerate(rivals):
        assert found[0] == i and len(found) == len(set(found)) == 1 + foreign.RIVALS
        assert set(found) <= set(range(25))
    assert len({tuple(sorted(found)) for found in rivals}) > 20          # not always the same ones
    assert rivals == foreign.Ruler(PlainPipe(), references).rivals
    few = foreign.Ruler(PlainPipe(), references[:3]).rivals
    assert [sorted(found) for found in few] == [[0, 1, 2]] * 3


def test_measures_of_a_copy_and_of_pictures_that_are_none(ruler):
    """By hand: a copy is a leak, unless its object was asked for; copied tokens keep their places.

    A blank picture has the texture of the smoothest reference, and light above dark is another
    texture than dark above light.
    """
    moved = painted(*[WHITE] * 8, *[RED] * 7, BLUE)          # the same squares, at other places
    car = painted(GREEN, *[RED] * 7, *[WHITE] * 8)           # all but its corner
    images = torch.stack([HOUSE, HOUSE, moved, car, OTHER, torch.ones(3, 16, 16)])
    objects = ["a cat", "a house", "a house", "a car", "a cat", "a tree"]
    found = ruler.measure(images, objects, 0, with_clip=False)
    assert found == {
        "object kept": [0, 1, 0, 1, 0, 0], "leak": [1, 0, 0, 0, 0, 0],
        "palette": [1, 1, 1, 1, 0, 0], "texture": [1, 1, 0, 1, 0, 1],
        "object and palette": [0, 1, 0, 1, 0, 0],
        "blank": [0, 0, 0, 0, 0, 1], "copied tokens": [1, 1, 0, 15 / 16, 0, 0.5]}
    assert all(type(value) is float for values in found.values() for value in values)


def test_the_other_references_are_the_measure(ruler):
    """The same picture held against another reference is near to its own one still."""
    for i, picture in enumerate((HOUSE, STRIPES, OTHER)):
        found = ruler.measure(picture[None], ["a cat"], i, with_clip=False)
        assert (found["palette"], found["texture"], found["copied tokens"]) == ([1], [1], [1])
        found = ruler.measure(picture[None], ["a cat"], (i + 1) % 3, with_clip=False)
        assert (found["palette"], found["texture"]) == ([0], [0])


def test_samples_of_the_first_stage_are_held_against_small_references(fake_judge):
    """Half as large: the references are scaled, and described once for each size."""
    large = F.interpolate(HOUSE[None], scale_factor=2)[0]
    ruler = foreign.Ruler(PlainPipe(), [reference("a house", large)])
    for images in (HOUSE[None], large[None]):
        assert ruler.measure(images, ["a cat"], 0, with_clip=False)["copied tokens"] == [1]
    assert sorted(ruler.described) == [16, 32]
    assert ruler.at_side(16) is ruler.at_side(16)


# -- the commands

def test_some_references_are_spread_over_all():
    assert foreign.spread(35, 12) == [0, 2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32]
    assert foreign.spread(3, 3) == foreign.spread(3, 12) == [0, 1, 2]
    assert foreign.spread(5, 1) == [0]


@pytest.fixture
def command(cli, tmp_path, monkeypatch, fake_judge, weights2):
    """command(*arguments) -> what it printed. Two references, six objects, two steps of all."""
    def load_references(used, resolution):
        pictures = noise_images(2, resolution, seed=len(used))
        contents = ("a house", "a pattern")                  # the judge has no name for this one
        return [Reference(file, content, f"oil {file[0]}", "oil", used, picture)
                for file, content, picture in zip(foreign.FIRST, contents, pictures)]

    for name in ("tune", "generate"):
        quick = functools.partialmethod(getattr(StyleDrop, name), steps=2)
        monkeypatch.setattr(StyleDrop, name, quick)
    for name in ("SUPERRES", "SUPERRES_SAMPLING"):
        monkeypatch.setattr(styledrop, name, replace(getattr(styledrop, name), steps=2))
    monkeypatch.setattr(foreign, "OBJECTS", OBJECTS[:foreign.SHOWN])
    monkeypatch.setattr(foreign, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(foreign, "load_references", load_references)

    def run(*arguments):
        code, out, err = cli(foreign.main, "--weights", weights2, "--device", "cpu", *arguments)
        assert code == 0, err
        return out
    return run


SIX = list(OBJECTS[:6])


def tables(text):
    """{first cell: [further cells]} of all tables of a report."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in rows}


def test_the_report(command, tmp_path, calls, pipe2):
    """Six arms, of which the last is the reference; each mean is of the JSON file."""
    tuned, sampled = calls(StyleDrop, "tune"), calls(StyleDrop, "generate")
    measured = calls(foreign.Ruler, "measure")
    command()
    folder = tmp_path / "results"
    assert sorted(path.name for path in folder.iterdir()) == [
        "foreign.jpg", "foreign.json", "foreign.md", "foreign_first.png"]
    found = json.loads((folder / "foreign.json").read_text())
    assert found["base"] == pipe2.base_id and found["objects"] == SIX
    assert found["can_leak"] == [True, False]

    assert [(positional[2:], named) for positional, named in tuned] == [
        (([""], RARE_TOKEN), {})] * 2
    assert [positional[1] for positional, _ in sampled] == [SIX] * 7
    assert all(named.pop("seed") == [0, 1, 2, 3, 4, 5] for _, named in sampled)
    assert [named for _, named in sampled if named] == [
        {"style_phrase": "oil b"}, {"style_phrase": "oil b", "sampling": styledrop.SAMPLING},
        {"style_phrase": "oil h"}, {"style_phrase": "oil h", "sampling": styledrop.SAMPLING}]

    (own, _, alike, base, other, _), (own_2, _, _, base_2, other_2, _) = (
        [positional[1] for positional, _ in measured[start:start + 6]] for start in (0, 6))
    assert not torch.equal(own, alike)
    assert torch.equal(other, own_2) and torch.equal(other_2, own) and torch.equal(base, base_2)
    assert not torch.equal(own, own_2)

    rows = tables((folder / "foreign.md").read_text())
    for name, title in foreign.ARMS.items():
        measures = found["measures"][name]
        assert len(measures) == 2
        assert len(measures[0]["blank"]) == (1 if name == "reference" else 6)
        copied = [100 * np.mean(row["copied tokens"]) for row in measures]
        assert rows[title][5].startswith(f"{np.mean(copied):.1f} ± ")
        style = np.mean([np.mean(row["style score"]) for row in measures])
        assert float(rows[title][7].split(" ± ")[0]) == pytest.approx(style, abs=1e-3)
    leaks = 100 * np.mean(found["measures"]["tuned"][0]["leak"])
    assert rows[foreign.ARMS["tuned"]][6] == f"{leaks:.1f} ± nan %"      # of the first one alone
    gains = [np.mean(one["palette"]) - np.mean(other["palette"])
             for one, other in zip(found["measures"]["tuned"], found["measures"]["other"])]
    assert rows[foreign.MINUS["other"]][1].startswith(f"{100 * np.mean(gains):+.1f} ± ")
    own = rows[foreign.ARMS["reference"]]
    assert own[0] == own[3] == own[6] == "-" and own[1] == own[2] == "100.0 ± 0.0 %"
    kept = 100 * np.mean(found["measures"]["tuned"][1]["object kept"])
    assert rows[foreign.FIRST[1]][:2] == ["oil", f"{kept:.0f} %"]
    assert rows[foreign.FIRST[0]][5] != "-" == rows[foreign.FIRST[1]][5]


def test_the_pictures_show_a_reference_and_its_samples(command, tmp_path, monkeypatch):
    """In the README's picture, two rows side by side; every reference is before its samples."""
    measures = dict.fromkeys((*foreign.MEASURES, "leak", "style score"),
                             [0.0] * len(foreign.OBJECTS))
    monkeypatch.setattr(foreign.Ruler, "measure", lambda *_, **__: measures)
    # tuned and twice words in turn, then base
    colours = iter([-1.0, 0.0, 0.0, 1.0, -0.5, -0.5, 0.5])
    monkeypatch.setattr(StyleDrop, "generate", lambda self, objects, *_, **__: torch.full(
        (len(objects), 3, 32, 32), next(colours)))
    command()
    with Image.open(tmp_path / "results" / "foreign_first.png") as sheet:
        assert sheet.mode == "P" and sheet.width == 12 * 36 + 4
        pixels = np.asarray(sheet.convert("L")).astype(int)[-36:-4]      # below the words
    cells = [pixels[:, 4 + 36 * i:36 + 36 * i] for i in range(12)]
    assert [round(cell.mean()) for cell in cells[1:6] + cells[7:]] == [0] * 5 + [255] * 5
    assert cells[0].std() > 30 and cells[6].std() > 30
    with Image.open(tmp_path / "results" / "foreign.jpg") as sheet:
        assert sheet.width == 7 * 36 + 4 and 2 * 36 + 4 < sheet.height < 150


def test_the_sweep_changes_one_setting_a_row(command, tmp_path, monkeypatch, calls):
    """Of tuning or of sampling; the file is written after each row, so an end loses only one."""
    monkeypatch.setattr(foreign, "SWEEP", [dict(), dict(lambda_a=3, steps=7, style="words",
                                                        content="an object"),
                                           dict(content="named")])
    tuned, sampled = calls(StyleDrop, "tune"), calls(StyleDrop, "generate")
    written = calls(foreign, "write_text")
    out = command("--sweep")
    assert len(out.splitlines()) == len(written) == 3
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["foreign_sweep.md"]
    first, _, last = (tables(positional[1]) for positional, _ in written)
    assert list(first)[1:] == ["the defaults"] and last["the defaults"] == first["the defaults"]
    assert list(last)[2:] == ["lambda_a 3, steps 7, style words, content an object",
                              "content named"]
    assert len(last["the defaults"]) == len(foreign.TITLES)

    assert all(named["superres"] is False for _, named in tuned)
    assert [positional[2:] for positional, _ in tuned] == [
        ([""], RARE_TOKEN), ([""], RARE_TOKEN), (["an object"], "oil b"), (["an object"], "oil h"),
        (["a house"], RARE_TOKEN), (["a pattern"], RARE_TOKEN)]
    steps = [named["tuning"].steps for _, named in tuned]
    assert steps == [ROUND_1.steps] * 2 + [7] * 2 + [ROUND_1.steps] * 2
    hows = [named["sampling"] for _, named in sampled]
    assert hows[:2] == [SAMPLING] * 2 and all(not named["superres"] for _, named in sampled)
    assert hows[2:4] == [replace(SAMPLING, lambda_a=3)] * 2 and hows[4:] == [SAMPLING] * 2


@pytest.mark.parametrize("options, used, name", [
    ([], "chosen", "foreign_sweep.md"), (["--confirm"], "reported", "foreign_confirm.md")])
def test_only_a_confirmation_sees_test_references(command, tmp_path, monkeypatch, calls, options,
                                                  used, name):
    """Trap: settings are chosen on what is reported."""
    monkeypatch.setattr(foreign, "SWEEP", [dict(), dict(views=1), dict(lambda_a=3)])
    loaded = calls(foreign, "load_references")
    command("--sweep", "views", *options)
    assert [positional[0] for positional, _ in loaded] == [used]
    text = (tmp_path / "results" / name).read_text()
    assert "| views 1 |" in text and "lambda_a" not in text


@pytest.mark.parametrize("arguments, words", [
    (["--sweep", "views", "foo"], "--sweep knows no setting 'foo'; give some of lambda_a, "),
    (["--confirm"], "--confirm needs --sweep")])
def test_a_sweep_of_nothing_is_refused(cli, arguments, words):
    """Traps: only the defaults are compared; the report runs instead."""
    code, out, err = cli(foreign.main, "--device", "cpu", *arguments)
    assert code == 2 and not out
    assert err.startswith(f"experiments.foreign.py: error: {words}") and err.count("\n") == 1


def test_every_setting_of_the_sweep_exists():
    known = {*vars(ROUND_1), *vars(SAMPLING), "style", "content"}
    assert all(changes.keys() <= known for changes in foreign.SWEEP)
    assert foreign.SWEEP[0] == {}            # the other rows are compared with it


# -- object_judge.py

class ToyArt:
    """Filled rectangles, each name in a shape of its own; the held-out set has a name more."""

    def __init__(self, role="training", size=64):
        self.names = ["cat", "house", "tree"] * 2 + ["new"] * 20 * (role == "held-out")
        self.drawings = np.zeros((len(self.names), size, size, 4), np.uint8)
        for drawing, name in zip(self.drawings, self.names):
            wide = 10 * len(name) - 10                       # 20, 40, 30 or 20
            drawing[20:44, 32 - wide // 2:32 + wide // 2] = (200, 40, 90, 255)


def some_drawings(count=8):
    """(count, 4, 64, 64) in [0, 1]."""
    drawings = torch.from_numpy(ToyArt().drawings).permute(0, 3, 1, 2).float() / 255
    return drawings[torch.arange(count) % 6]


def test_disguises_are_pictures_of_their_generator_alone():
    """Trap: numbers of PyTorch's global generator, with which no training can be repeated."""
    rgba = some_drawings()
    before, state = rgba.clone(), torch.random.get_rng_state()
    one, same, other = (object_judge.disguised(rgba, generator(seed)) for seed in (3, 3, 4))
    assert one.shape == (8, 3, 64, 64) and one.min() >= 0 and one.max() <= 1
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(rgba, before) and torch.equal(torch.random.get_rng_state(), state)
    different = [(x - y).abs().mean() > 0.02 for i, x in enumerate(one) for y in one[:i]]
    assert np.mean(different) > 0.9


def test_a_disguise_of_nothing_shows_nothing():
    """Trap: contours of the frame, where the picture ends."""
    found = object_judge.disguised(torch.zeros(128, 4, 64, 64), generator())
    inner = found[..., 16:48, 16:48].flatten(2)
    is_plain = (inner.amax(2) - inner.amin(2) < 1e-3).all(1)
    assert is_plain.sum() > 10                               # others have a mottled ground
    whole = found[is_plain].flatten(2)
    assert (whole.amax(2) - whole.amin(2)).max() < 0.02


def test_the_accuracy_is_of_the_drawings_whose_names_are_known(monkeypatch):
    """As drawn, on white, a judge of widths names all; one that always says "house", its share."""
    monkeypatch.setattr(data, "Art", ToyArt)
    names, seen = ["cat", "house", "tree"], []

    def by_width(images):
        seen.append(images)
        wide = (images[:, 1, 32] < 0.5).sum(1, keepdim=True)
        return -(wide - torch.tensor([[20, 40, 30]])).abs().float()

    for role in ("training", "held-out"):
        assert object_judge.accuracy(by_width, names, role, "as drawn", count=30) == (1, 30)
    assert seen[0].shape == (30, 3, 64, 64) and (seen[0][..., 0, 0] == 1).all()
    always = functools.partial(torch.tensordot, torch.tensor([0.0, 1, 0]), dims=0)

    def house(images):
        return always(torch.ones(len(images))).T

    for kind in ("disguised", "free styles"):
        share, count = object_judge.accuracy(house, names, "training", kind, count=30)
        assert share == pytest.approx(
            (by_width(seen[0]).argmax(1) == 1).float().mean().item()) and count == 30


def test_the_judge_is_trained_and_read_again(cli, tmp_path, monkeypatch, pipe):
    """Two steps; it names pictures of any size."""
    monkeypatch.setattr(data, "Art", ToyArt)
    monkeypatch.setattr(object_judge, "StyleDrop", SimpleNamespace(load=lambda device: pipe))
    few = functools.partial(object_judge.accuracy, count=4)
    monkeypatch.setattr(object_judge, "accuracy", few)
    with torch.random.fork_rng():
        code, out, err = cli(object_judge.main, "--steps", 2, "--batch", 16,
                             "--out", tmp_path / "judge.pt")
    assert code == 0, err
    assert out.startswith("step 2/2  loss ") and out.count(" of 4 named among 3\n") == 6
    judge, names = object_judge.load_judge(tmp_path / "judge.pt")
    assert names == ["cat", "house", "tree"] and not judge.training
    images = noise_images(3, 64)
    scores = object_judge.name_scores(judge, images)
    assert scores.shape == (3, 3) and torch.allclose(scores, judge(images), atol=1e-5)
    large = F.interpolate(images, scale_factor=2)
    assert torch.allclose(object_judge.name_scores(judge, large), scores, atol=1e-5)
