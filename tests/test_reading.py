"""data.reading: pixels mean what the file says; one line for what cannot be read."""

import base64
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

import data

SCENE = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
SCENE = SCENE.repeat(8, 0).repeat(8, 1)
COLOUR = (30, 160, 60)
EXACT = {".webp": dict(lossless=True), ".jpg": dict(quality=100, subsampling=0)}


def save(path, image, **options):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(path, **EXACT.get(path.suffix, {}) | options)
    return path


def away(path, expected, size=32, read=data.read_image):
    """The largest difference of what is read from what is expected."""
    image = read(path, size)
    assert image.shape == (size, size, 3) and image.dtype == np.uint8
    return np.abs(image.astype(int) - expected).max()


def refusal(path, read=data.read_image):
    with pytest.raises(ValueError) as error:
        read(path, 8)
    assert "\n" not in str(error.value) and Path(path).name[-20:] in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("mode, suffix, colour, expected", [
    ("CMYK", ".jpg", (0, 0, 0, 0), 255), ("L", ".png", 90, 90), ("1", ".png", 1, 255),
    ("RGB", ".bmp", (7, 7, 7), 7), ("LA", ".png", (0, 0), 255), ("P", ".png", 0, 255),
    ("RGBA", ".png", (255, 0, 0, 0), 255), ("LAB", ".tif", (255, 128, 128), 250)])
def test_modes(tmp_path, mode, suffix, colour, expected):
    """One pixel or many, the centre square of it; what is transparent lies on white."""
    for size in ((9, 5), (1, 1)):
        clear = dict(transparency=0) if mode == "P" else {}
        path = save(tmp_path / f"a{suffix}", Image.new(mode, size, colour), **clear)
        assert away(path, expected, 4) <= (5 if mode == "LAB" else 2)
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    assert away(save(tmp_path / "b.png", wide), 255, 10) == 0


# -- what is no picture

def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def test_what_is_no_picture(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = save(tmp_path / "whole.png", noise).read_bytes()
    garbled = bytearray(save(tmp_path / "damaged.tif", noise).read_bytes())
    garbled[12::7] = bytes(byte ^ 0x5a for byte in garbled[12::7])
    rest = chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    head = lambda side: chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    wide = lambda side: whole[:8] + head(side) + rest
    for name, content, words in [
            ("empty.png", b"", "is empty"), ("text.png", b"not a picture", "not a picture"),
            ("half.png", whole[:len(whole) // 2], "cannot be read"),
            ("damaged.tif", garbled, "damaged"), ("large.png", wide(9_000), "9000 x 9000"),
            ("bomb.png", wide(20_000), "too many pixels"),   # Pillow itself refuses that
            ("a.svg", b"<?xml version='1.0'?>\n<!-- drawn -->\n<svg width='9'>", "SVG; convert"),
            ("a.jpg", b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC or AVIF; convert it to PNG")]:
        (tmp_path / name).write_bytes(content)
        assert words in refusal(tmp_path / name)


def test_no_program_is_run_for_a_file(tmp_path):
    """Trap: EPS, which Pillow hands to Ghostscript."""
    path = tmp_path / "a.eps"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n\n\n")
    assert "EPS; convert it to PNG" in refusal(path)


@pytest.mark.parametrize("name, words", [
    ("missing.png", "no picture at"), ("x" * 300 + ".png", "name is too long"),
    ("a\0b.png", "cannot be a name"), ("", "is a folder"), ("pipe.png", "a device or a pipe"),
    ("circle.png", "links go in a circle")])
def test_a_path_that_is_no_file(tmp_path, name, words):
    """Our own words. Trap: "[Errno 36] File name too long", or a pipe that nobody writes to."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "circle.png").symlink_to(tmp_path / "circle.png")
    line = refusal(tmp_path / name)
    assert words in line and "Errno" not in line
    if name and name != "pipe.png":
        for read in (data.read_words, data.Folder):
            assert "Errno" not in refusal(tmp_path / name, lambda path, _: read(path))


# -- colour profiles

# A minimal ICC v2 profile of Display P3: three columns at D50 and one gamma, 2.2
P3 = zlib.decompress(base64.b85decode(
    "c-muNU_6kMoLkH!z`&53S5g$@?xYYA8KuC01QL^r3mEW%Z`T+YLG)!^2GRjXN@{U3kbVNhG36x%B@7IV4nVd@5zr"
    "w(b_j@_4q<12*hvs}4OmS`kTZ}y0mv3ehp-ob*hvuf1`r!+J_s-sFi;mD!U_=v2(jjS3=FpW|NsBL10m*hkbz;N2"
    "?GPyE`*qd1p|X1F9XAg-N~gzWl*CTnT#122=M`gG&T4"))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
def test_profiles_become_srgb(tmp_path, suffix):
    """The same colour written in Display P3 is read as that colour. Trap: its bare numbers."""
    flat, srgb = Image.new("RGB", (16, 16), COLOUR), ImageCms.createProfile("sRGB")
    wide = ImageCms.profileToProfile(flat, srgb, io.BytesIO(P3))
    assert np.abs(np.asarray(wide)[0, 0].astype(int) - COLOUR).max() > 20
    for mode in ("RGB",) if suffix == ".jpg" else ("RGB", "RGBA"):
        path = save(tmp_path / f"a{suffix}", wide.convert(mode), icc_profile=P3)
        assert away(path, COLOUR) <= 4


def test_a_bad_profile_is_passed_over(tmp_path):
    """Also one of another space; an RGB profile serves for grey."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name, image, profile, expected in [
            ("a.png", Image.new("RGB", (8, 8), COLOUR), b"no profile", COLOUR),
            ("b.png", Image.new("RGB", (8, 8), COLOUR), P3[:200], COLOUR),
            ("c.jpg", Image.new("CMYK", (8, 8)), P3, 255),
            ("d.png", Image.new("L", (8, 8), 90), srgb, 90)]:
        assert away(save(tmp_path / name, image, icc_profile=profile), expected) <= 1


def with_chunk(path, chunk):
    """A PNG with one more chunk behind its header."""
    whole = path.read_bytes()
    path.write_bytes(whole[:33] + chunk + whole[33:])
    return path


@pytest.mark.parametrize("gamma, expected", [(45455, 128), (100_000, 186)])
def test_gamma_of_png(tmp_path, gamma, expected):
    """100,000 says that the numbers are light itself. Trap: it is drawn too dark."""
    path = save(tmp_path / "a.png", Image.new("RGB", (8, 8), (128, 128, 128)))
    assert away(with_chunk(path, chunk(b"gAMA", struct.pack(">I", gamma))), expected) <= 1


# -- greys of more than 8 bits

RAMP = np.tile(np.linspace(0, 1, 16), (16, 1))
EIGHT = (RAMP * 255).round()[..., None]


@pytest.mark.parametrize("suffix, top, kind, tags, share", [
    (".png", 65535, np.uint16, {}, 1), (".pgm", 65535, np.uint16, {}, 1),
    (".tif", 4095, np.uint16, {}, 1),                       # with a note. Trap: all but black
    (".tif", 4095, np.uint16, {281: 65535}, 1 / 16),        # and it is dark, truly
    (".tif", 1, np.float32, {}, 1), (".tif", 1.2, np.float32, {341: 1.2}, 1),
    (".tif", 8, np.float32, {281: 8}, 1), (".tif", 1e6, np.int32, {341: 1e6}, 1)])
def test_greys_are_scaled_by_what_the_file_says(tmp_path, suffix, top, kind, tags, share, capsys):
    pixels = (RAMP * top).astype(kind) if kind == np.float32 else (RAMP * top).round().astype(kind)
    path = save(tmp_path / f"a{suffix}", pixels, **dict(tiffinfo=tags) if tags else {})
    assert away(path, EIGHT * share, 16) <= 1
    assert ("read as 12 bits" in capsys.readouterr().err) == (top == 4095 and not tags)
    if tags == {281: 65535}:                                # where white is zero: the negative
        assert away(save(path, pixels, tiffinfo=tags | {262: 0}), 255 - EIGHT * share, 16) <= 1


@pytest.mark.parametrize("value, expected", [(0x8000, 128), (0xffff, 255), (900, 3.5), (200, 1)])
def test_a_flat_dark_picture_stays_dark(tmp_path, value, expected):
    assert away(save(tmp_path / "a.png", np.full((4, 4), value, np.uint16)), expected) <= 1


@pytest.mark.parametrize("pixels", [RAMP * 1.2, -RAMP]
                         + [(RAMP * top).astype(np.int32) for top in (1e6, 0, -1e6)])
def test_greys_that_do_not_say(tmp_path, pixels):
    """Trap: black, or a guess."""
    pixels = pixels if pixels.dtype == np.int32 else pixels.astype(np.float32)
    assert "which value is white" in refusal(save(tmp_path / "a.tif", pixels))
    for bad in (np.nan, np.inf):
        pixels = RAMP.astype(np.float32)
        pixels[3, 3] = bad
        assert "not numbers" in refusal(save(tmp_path / "a.tif", pixels))


# -- metadata

@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_upright(tmp_path, turn, suffix):
    """All eight orientations, with sixteen bits as well."""
    exif = Image.Exif()
    exif[0x112] = turn
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}       # Pillow's methods that turn it so
    image = Image.fromarray(SCENE)
    stored = image.transpose(Image.Transpose(undo[turn])) if turn > 1 else image
    assert away(save(tmp_path / f"a{suffix}", stored, exif=exif), SCENE) == 0
    grey = np.asarray(stored)[..., 0].astype(np.uint16) * 257
    assert away(save(tmp_path / "b.png", grey, exif=exif), SCENE[..., :1]) == 0


@pytest.mark.parametrize("bad", [
    chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x02ab\0\0"),   # turned by words
    chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0\xff\xfe<tiff:Orientation=\"\xff6"),
    chunk(b"zTXt", b"a\0\0" + zlib.compress(b" " * 70_000_000)),              # not to be unpacked
    chunk(b"tEXt", b"a\0b")[:-4] + b"\0\0\0\0",                               # a wrong checksum
    chunk(b"gAMA", b"\0"), chunk(b"iCCP", b"p\0\0nonsense")], ids=lambda bad: str(bad[4:16]))
def test_bad_metadata_never_refuses_a_good_picture(tmp_path, bad):
    assert away(with_chunk(save(tmp_path / "a.png", SCENE), bad), SCENE) == 0
    exif = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"
    assert away(save(tmp_path / "a.jpg", SCENE, exif=exif), SCENE) < 16


# -- frames

@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".tif"])
def test_the_first_frame_that_shows_something(tmp_path, suffix):
    """Later ones may be damaged."""
    blank, scene, other = map(Image.fromarray, (SCENE | 255, SCENE, SCENE[::-1].copy()))
    for frames in ([blank, blank, scene, other], [scene, other, blank]):
        path = save(tmp_path / f"a{suffix}", frames[0], save_all=True, append_images=frames[1:])
        assert np.abs(data.read_image(path, 32).astype(int) - SCENE).mean() < 4
    path.write_bytes(path.read_bytes()[:-300 if suffix == ".gif" else None])
    assert np.abs(data.read_image(path, 32).astype(int) - SCENE).mean() < 4


# -- what is transparent, and what shows nothing

@pytest.mark.parametrize("colour, background", [
    ((255, 255, 255), 48), ((240, 244, 250), 48), ((0, 0, 0), 255), ((200, 60, 60), 255)])
@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_a_background_that_shows_the_drawing(tmp_path, colour, background, mode, capsys):
    drawing = Image.new("RGBA", (32, 32))
    drawing.paste((*colour, 255), (0, 0, 16, 32))
    path = save(tmp_path / "a.png", drawing if mode == "RGBA" else drawing.quantize(8))
    image = data.read_reference(path, 32)
    assert (image[:, 20:] == background).all()
    assert np.abs(image[:, :12].astype(int) - colour).max() < 3
    assert ("dark background" in capsys.readouterr().err) == (background == 48)
    drawing.paste((255, 255, 255, 255), (0, 0, 16, 32))      # a snowman with a black hat:
    drawing.paste((0, 0, 0, 255), (0, 0, 16, 4))             # seen on white
    assert (data.read_image(save(tmp_path / "b.png", drawing), 32)[10, 30] == 255).all()


def test_a_reference_of_one_colour(tmp_path):
    """As a training picture it is one. A small object is something."""
    wide, small = Image.new("RGB", (300, 20), "white"), Image.new("RGB", (64, 64), "white")
    wide.paste("red", (0, 0, 60, 20))
    small.paste("navy", (30, 30, 36, 36))
    faint = np.random.default_rng(0).integers(250, 256, (32, 32, 3), dtype=np.uint8)
    for image, words in [(wide, "its centre square"), (faint, "the picture"),
                         (Image.new("RGBA", (32, 32)), "the picture")]:
        path = save(tmp_path / "a.png", image)
        data.read_image(path, 8)
        assert words in refusal(path, data.read_reference)
    data.read_reference(save(tmp_path / "b.png", small), 64)
