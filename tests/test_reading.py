"""data.reading: pixels mean what the file says; one line for what cannot be read."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

import data
from data.reading import one_colour

SCENE = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
SCENE = SCENE.repeat(8, 0).repeat(8, 1)
COLOUR = (30, 160, 60)


def save(path, image, **options):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(path, **options)
    return path


def refusal(path, read=data.read_image):
    with pytest.raises(ValueError) as error:
        read(path, 8)
    assert "\n" not in str(error.value) and path.name in str(error.value)
    return str(error.value)


# -- the plain cases

def test_alpha_lies_on_white(tmp_path):
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (data.read_image(save(tmp_path / "a.png", clear), 4) == 255).all()
    grey = Image.new("LA", (8, 8), (0, 0))
    assert (data.read_image(save(tmp_path / "b.png", grey), 4) == 255).all()
    indexed = Image.new("P", (8, 8), 0)
    assert (data.read_image(save(tmp_path / "c.png", indexed, transparency=0), 4) == 255).all()


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    for value, expected in ((0x8000, 128), (0xffff, 255), (200, 1)):    # a dark picture stays dark
        flat = Image.fromarray(np.full((4, 4), value, np.uint16))
        read = data.read_image(save(tmp_path / "a.png", flat), 2)
        assert abs(int(read[0, 0, 0]) - expected) <= 1
    half = Image.fromarray(np.full((4, 4), 0.5, np.float32))
    assert abs(int(data.read_image(save(tmp_path / "a.tif", half), 2)[0, 0, 0]) - 128) <= 1


@pytest.mark.parametrize("mode, suffix, colour, expected", [
    ("CMYK", ".jpg", (0, 0, 0, 0), 255), ("L", ".png", 90, 90), ("1", ".png", 1, 255),
    ("RGB", ".bmp", (7, 7, 7), 7)])
def test_modes(tmp_path, mode, suffix, colour, expected):
    image = data.read_image(save(tmp_path / f"a{suffix}", Image.new(mode, (9, 5), colour)), 4)
    assert image.shape == (4, 4, 3) and image.dtype == np.uint8
    assert abs(image.astype(int) - expected).max() <= 2


def test_one_pixel_and_upright(tmp_path):
    one = save(tmp_path / "a.png", Image.new("RGB", (1, 1), "red"))
    assert data.read_image(one, 4).shape == (4, 4, 3)
    picture = Image.fromarray(np.repeat(np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8), 2, 0))
    exif = Image.Exif()
    exif[0x112] = 3                                          # upside down
    turned = data.read_image(save(tmp_path / "b.png", picture, exif=exif), 2)
    assert turned[0, 0].tolist() == [0, 0, 255]


def test_centre_square(tmp_path):
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    assert (data.read_image(save(tmp_path / "a.png", Image.fromarray(wide)), 10) == 255).all()


def test_what_is_no_picture(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not a picture")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    whole = save(tmp_path / "whole.png", noise).read_bytes()
    (tmp_path / "half.png").write_bytes(whole[:len(whole) // 2])
    garbled = bytearray(save(tmp_path / "damaged.tif", noise).read_bytes())
    garbled[12::7] = bytes(byte ^ 0x5a for byte in garbled[12::7])
    (tmp_path / "damaged.tif").write_bytes(garbled)
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")    # Pillow refuses it
    Image.new("1", (9_000, 9_000)).save(tmp_path / "large.png")
    for name, words in [("missing.png", "no picture"), ("", "folder"), ("empty.png", "is empty"),
                        ("text.png", "not a picture"), ("half.png", "cannot be read"),
                        ("bomb.png", "pixels"), ("large.png", "9000 x 9000"),
                        ("damaged.tif", "damaged.tif")]:
        with pytest.raises(ValueError, match=words) as error:
            data.read_image(tmp_path / name, 4)
        assert "\n" not in str(error.value)


# -- colour profiles

def icc(primaries, gamma=2.2):
    """A minimal ICC v2 profile: matrix of D50 columns for red, green, blue, one gamma."""
    fixed = lambda values: b"".join(struct.pack(">i", round(v * 65536)) for v in values)
    xyz = lambda values: b"XYZ \0\0\0\0" + fixed(values)
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    text = b"desc\0\0\0\0" + struct.pack(">I", 2) + b"p\0" + b"\0" * 78
    tags = [(b"desc", text), (b"wtpt", xyz((0.9642, 1, 0.8249)))]
    tags += [(name + b"XYZ", xyz(p)) for name, p in zip((b"r", b"g", b"b"), primaries)]
    tags += [(name + b"TRC", curve) for name in (b"r", b"g", b"b")]
    at, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, value in tags:
        value += b"\0" * (-len(value) % 4)
        table += name + struct.pack(">II", at + len(body), len(value))
        body += value
    head = struct.pack(">I4sI12s", at + len(body), b"lcms", 0x02100000, b"mntrRGB XYZ ")
    head += b"\0" * 12 + b"acsp" + b"\0" * 28 + fixed((0.9642, 1, 0.8249)) + b"\0" * 48
    return head + struct.pack(">I", len(tags)) + table + body


P3 = icc([(0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841)])


@pytest.mark.parametrize("suffix, alpha", [(".png", False), (".png", True), (".jpg", False),
                                           (".tif", False), (".tif", True), (".webp", False),
                                           (".webp", True)])
def test_profiles_become_srgb(tmp_path, suffix, alpha):
    """The same colour written in Display P3 is read as that colour. Trap: its bare numbers."""
    flat = Image.new("RGB", (16, 16), COLOUR)
    wide = ImageCms.profileToProfile(flat, ImageCms.createProfile("sRGB"), io.BytesIO(P3))
    assert np.abs(np.asarray(wide)[0, 0].astype(int) - COLOUR).max() > 20
    wide = wide.convert("RGBA") if alpha else wide
    options = {".webp": dict(lossless=True), ".jpg": dict(quality=100)}.get(suffix, {})
    path = save(tmp_path / f"a{suffix}", wide, icc_profile=P3, **options)
    assert np.abs(data.read_image(path, 4).astype(int) - COLOUR).max() <= 4


@pytest.mark.parametrize("profile", [b"", b"no profile", P3[:200], b"\0" * 500])
def test_a_bad_profile_is_passed_over(tmp_path, profile):
    path = save(tmp_path / "a.png", Image.new("RGB", (8, 8), COLOUR), icc_profile=profile)
    assert (data.read_image(path, 4) == COLOUR).all()


def test_a_profile_of_another_space_is_passed_over(tmp_path):
    path = save(tmp_path / "a.jpg", Image.new("CMYK", (8, 8)), icc_profile=P3)
    assert (data.read_image(path, 4) == 255).all()


def test_grey_with_an_rgb_profile(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    path = save(tmp_path / "a.png", Image.new("L", (8, 8), 90), icc_profile=srgb)
    assert np.abs(data.read_image(path, 4).astype(int) - 90).max() <= 1


def test_lab(tmp_path):
    path = save(tmp_path / "a.tif", Image.new("LAB", (8, 8), (255, 128, 128)))
    assert (data.read_image(path, 4) > 245).all()


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_chunk(path, chunk):
    """A PNG with one more chunk behind its header."""
    whole = path.read_bytes()
    path.write_bytes(whole[:33] + chunk + whole[33:])
    return path


@pytest.mark.parametrize("gamma, expected", [(45455, 128), (100_000, 186)])
def test_gamma_of_png(tmp_path, gamma, expected):
    """100,000 says that the numbers are light itself. Trap: it is drawn too dark."""
    path = save(tmp_path / "a.png", Image.new("RGB", (8, 8), (128, 128, 128)))
    with_chunk(path, chunk(b"gAMA", struct.pack(">I", gamma)))
    assert np.abs(data.read_image(path, 4).astype(int) - expected).max() <= 1


# -- greys of more than 8 bits

RAMP = np.tile(np.linspace(0, 1, 16), (16, 1))
EIGHT = (RAMP * 255).round()


def close(path, expected=EIGHT, by=1):
    image = data.read_image(path, 16)
    assert np.abs(image[..., 0].astype(int) - expected).max() <= by
    return image


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_sixteen_bits(tmp_path, suffix, capsys):
    close(save(tmp_path / f"a{suffix}", (RAMP * 65535).round().astype(np.uint16)))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("tags, said", [({}, "12 bits"), ({281: 4095}, "")])
def test_twelve_bits_in_sixteen(tmp_path, tags, said, capsys):
    """By the file's own word, or else as the docstring says, with a note. Trap: all but black."""
    pixels = (RAMP * 4095).round().astype(np.uint16)
    close(save(tmp_path / "a.tif", pixels, tiffinfo=tags))
    assert said in capsys.readouterr().err


def test_the_files_word_goes_first(tmp_path):
    pixels = (RAMP * 4095).round().astype(np.uint16)        # and it is dark, truly
    close(save(tmp_path / "a.tif", pixels, tiffinfo={281: 65535}), (RAMP * 4095 / 257).round())


def test_a_flat_dark_picture_stays_dark(tmp_path):
    close(save(tmp_path / "a.tif", np.full((16, 16), 900, np.uint16)), 4)


def test_white_is_zero(tmp_path):
    pixels = ((1 - RAMP) * 65535).round().astype(np.uint16)
    close(save(tmp_path / "a.tif", pixels, tiffinfo={262: 0}))


@pytest.mark.parametrize("top, tags", [(1, {}), (1.2, {341: 1.2}), (255, {341: 255.0}),
                                       (8, {281: 8})])
def test_floats(tmp_path, top, tags):
    close(save(tmp_path / "a.tif", (RAMP * top).astype(np.float32), tiffinfo=tags))


@pytest.mark.parametrize("top", [1.2, 255, 1e30, -1])
def test_floats_that_do_not_say(tmp_path, top):
    """Trap: black, or a guess."""
    path = save(tmp_path / "a.tif", (RAMP * top).astype(np.float32))
    assert "which value is white" in refusal(path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_floats_that_are_no_numbers(tmp_path, bad):
    pixels = RAMP.astype(np.float32)
    pixels[3, 3] = bad
    assert "not numbers" in refusal(save(tmp_path / "a.tif", pixels))


def test_int32(tmp_path):
    pixels = (RAMP * 1_000_000).astype(np.int32)
    assert "which value is white" in refusal(save(tmp_path / "a.tif", pixels))
    assert "which value is white" in refusal(save(tmp_path / "b.tif", pixels * 0))
    assert "which value is white" in refusal(save(tmp_path / "c.tif", -pixels))
    close(save(tmp_path / "d.tif", pixels, tiffinfo={341: 1e6}))


# -- metadata

def turned(path):
    return data.read_image(path, 32)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_upright(tmp_path, turn, suffix):
    """All eight orientations, with sixteen bits as well."""
    exif = Image.Exif()
    exif[0x112] = turn
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}       # Pillow's methods that turn it so
    image = Image.fromarray(SCENE)
    stored = image.transpose(Image.Transpose(undo[turn])) if turn > 1 else image
    options = dict(lossless=True) if suffix == ".webp" else {}
    path = save(tmp_path / f"a{suffix}", stored, exif=exif, **options)
    assert np.array_equal(turned(path), SCENE)
    grey = np.asarray(stored)[..., 0].astype(np.uint16) * 257
    path = save(tmp_path / "b.png", grey, exif=exif)
    assert np.array_equal(turned(path)[..., 0], SCENE[..., 0])


BAD_CHUNKS = {
    "raw EXIF": chunk(b"tEXt", b"Raw profile type exif\0\nexif\n      20\nzzzz"),
    "EXIF": chunk(b"eXIf", b"nonsense"),
    "EXIF cut off": chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\x05\x01\x12"),
    "an orientation of words": chunk(
        b"eXIf", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x02ab\0\0"),
    "XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation='9"),
    "XMP with bytes": chunk(
        b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0\xff\xfe<tiff:Orientation=\"\xff6"),
    "a text that does not unpack": chunk(b"zTXt", b"a\0\0nonsense"),
    "a text packed by an unknown way": chunk(b"zTXt", b"a\0\x07nonsense"),
    "a text of 70 MB": chunk(b"zTXt", b"a\0\0" + zlib.compress(b" " * 70_000_000)),
    "a wrong checksum": chunk(b"tEXt", b"a\0b")[:-4] + b"\0\0\0\0",
    "a short gamma": chunk(b"gAMA", b"\0"),
    "a short density": chunk(b"pHYs", b"\0"),
    "a profile that does not unpack": chunk(b"iCCP", b"p\0\0nonsense"),
    "an empty profile": chunk(b"iCCP", b""),
    "an unknown note": chunk(b"abCd", b"\0" * 10),
}


@pytest.mark.parametrize("name", BAD_CHUNKS)
def test_bad_metadata_never_refuses_a_good_picture(tmp_path, name):
    path = with_chunk(save(tmp_path / "a.png", SCENE), BAD_CHUNKS[name])
    assert np.array_equal(data.read_image(path, 32), SCENE)


@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"])
def test_bad_exif_in_jpeg(tmp_path, exif):
    path = save(tmp_path / "a.jpg", SCENE, exif=exif, quality=100, subsampling=0)
    assert np.abs(data.read_image(path, 32).astype(int) - SCENE).mean() < 2


# -- frames

def film(path, *frames, **options):
    frames = [Image.fromarray(f) if isinstance(f, np.ndarray) else f for f in frames]
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    return path


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".tif"])
def test_the_first_frame_that_shows_something(tmp_path, suffix):
    blank, options = Image.new("RGB", (32, 32), "white"), {}
    if suffix == ".webp":
        options = dict(lossless=True)
    path = film(tmp_path / f"a{suffix}", blank, blank, SCENE, SCENE[::-1].copy(), **options)
    assert np.abs(data.read_image(path, 32).astype(int) - SCENE).mean() < 4
    path = film(tmp_path / f"b{suffix}", SCENE, SCENE[::-1].copy(), blank, **options)
    assert np.abs(data.read_image(path, 32).astype(int) - SCENE).mean() < 4


def test_later_frames_may_be_damaged(tmp_path):
    blank = Image.new("RGB", (32, 32), "white")
    path = film(tmp_path / "a.gif", blank, SCENE)
    path.write_bytes(path.read_bytes()[:-300])
    assert data.read_image(path, 8).shape == (8, 8, 3)


# -- what is transparent

@pytest.mark.parametrize("colour, ground", [
    ((255, 255, 255), 48), ((240, 244, 250), 48), ((0, 0, 0), 255), ((200, 60, 60), 255)])
@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_a_ground_that_shows_the_drawing(tmp_path, colour, ground, mode, capsys):
    drawing = Image.new("RGBA", (32, 32))
    drawing.paste((*colour, 255), (0, 0, 16, 32))
    path = save(tmp_path / "a.png", drawing if mode == "RGBA" else drawing.quantize(8))
    image = data.read_reference(path, 32)
    assert (image[:, 20:] == ground).all() and np.abs(image[:, :12].astype(int) - colour).max() < 3
    assert ("dark ground" in capsys.readouterr().err) == (ground == 48)


def test_a_little_colour_keeps_the_white_ground(tmp_path):
    """A snowman with a black hat is seen on white."""
    drawing = Image.new("RGBA", (32, 32), (255, 255, 255, 255))
    drawing.paste((0, 0, 0, 255), (0, 0, 32, 4))
    drawing.paste((0, 0, 0, 0), (24, 4, 32, 32))
    assert (data.read_image(save(tmp_path / "a.png", drawing), 32)[10, 30] == 255).all()


# -- nothing to learn from

def test_a_reference_of_one_colour(tmp_path):
    wide = Image.new("RGB", (300, 20), "white")
    wide.paste("red", (0, 0, 60, 20))
    faint = np.random.default_rng(0).integers(250, 256, (32, 32, 3), dtype=np.uint8)
    clear = Image.new("RGBA", (32, 32))
    for name, image, words in [("pano.png", wide, "its centre square"),
                               ("a.png", faint, "the picture"), ("b.png", clear, "the picture"),
                               ("c.png", Image.new("L", (9, 9)), "the picture")]:
        path = save(tmp_path / name, image)
        data.read_image(path, 8)                             # as a training picture it is one
        assert words in refusal(path, data.read_reference)


def test_a_small_thing_is_something(tmp_path):
    image = Image.new("RGB", (64, 64), "white")
    image.paste("navy", (30, 30, 36, 36))
    data.read_reference(save(tmp_path / "a.png", image), 64)
    assert one_colour(np.full((8, 8, 3), 7, np.uint8)) and not one_colour(SCENE)


# -- what is not read

@pytest.mark.parametrize("name, start, kind", [
    ("a.svg", b"<?xml version='1.0'?>\n<!-- drawn -->\n<svg width='9'>", "SVG"),
    ("a.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
    ("a.jpg", b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC"), ("a.pdf", b"%PDF-1.7\n", "PDF"),
    ("a.jxl", b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"), ("a.txt", b"words", "not a picture"),
    ("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "EPS")])
def test_convert_it_to_png(tmp_path, name, start, kind):
    """Trap: EPS, which Pillow hands to Ghostscript: a program, run for a file."""
    path = tmp_path / name
    path.write_bytes(start + b"\n" * 99)
    line = refusal(path)
    assert kind in line and "convert it to PNG" in line


def test_random_damage(tmp_path):
    """Bytes changed, or the end cut off, in every format: a picture or one line."""
    rng, made, refused = np.random.default_rng(0), 0, 0
    for suffix in (".png", ".jpg", ".tif", ".gif", ".webp", ".bmp"):
        whole = save(tmp_path / f"whole{suffix}", SCENE).read_bytes()
        for i in range(25):
            bytes_ = bytearray(whole[:rng.integers(1, len(whole))] if i % 3 == 0 else whole)
            for at in rng.integers(len(bytes_), size=rng.integers(1, 9)):
                bytes_[at] = rng.integers(256)
            path = tmp_path / f"a{suffix}"
            path.write_bytes(bytes_)
            try:
                assert data.read_image(path, 8).shape == (8, 8, 3)
                made += 1
            except ValueError as error:
                assert "\n" not in str(error)
                refused += 1
    assert made > 20 and refused > 20
