"""data.reading: pixels mean what the file says, and a refusal says in one line what is wrong."""

import base64
import io
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, features

import data
from data import reading

SCENE = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
SCENE = SCENE.repeat(8, 0).repeat(8, 1)
GREY = SCENE[..., :1]
COLOUR = (30, 160, 60)
EXACT = {".webp": dict(lossless=True), ".jpg": dict(quality=100, subsampling=0)}


def save(path, image, **options):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(path, **EXACT.get(path.suffix, {}) | options)
    return path


def write(path, content):
    path.write_bytes(content)
    return path


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(samples, *chunks):
    """The bytes of a PNG. samples: uint8 or uint16 (height, width, 1 to 4)."""
    height, width, channels = samples.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]                # grey, grey and alpha, RGB, RGBA
    header = struct.pack(">IIBBBBB", width, height, 8 * samples.itemsize, kind, 0, 0, 0)
    rows = samples.astype(samples.dtype.newbyteorder(">")).reshape(height, -1)
    pixels = b"".join(b"\0" + row.tobytes() for row in rows)
    return b"".join([b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), *chunks,
                     chunk(b"IDAT", zlib.compress(pixels)), chunk(b"IEND", b"")])


def tiff(samples, order="<", photometric=2, extra=None, white=None, planar=False, packed=False):
    """The bytes of a TIFF. samples: uint16 (height, width, channels). white: MaxSampleValue."""
    height, width, channels = samples.shape
    values = samples.astype(samples.dtype.newbyteorder(order))
    strips = [values.tobytes()]
    if planar:
        strips = [plane.tobytes() for plane in np.moveaxis(values, 2, 0)]
    if packed:
        strips = [zlib.compress(strip) for strip in strips]
    starts = [8 + sum(map(len, strips[:i])) for i in range(len(strips))]
    tags = {256: [width], 257: [height], 258: [16] * channels, 259: [8 if packed else 1],
            262: [photometric], 273: starts, 277: [channels], 278: [height],
            279: [len(strip) for strip in strips], 284: [2 if planar else 1]}
    if white is not None:
        tags[281] = [white] * channels
    if extra is not None:
        tags[338] = [extra]
    start = starts[-1] + len(strips[-1])
    directory, values = struct.pack(order + "H", len(tags)), b""
    for tag, numbers in sorted(tags.items()):
        body = struct.pack(f"{order}{len(numbers)}I", *numbers)
        directory += struct.pack(order + "HHI", tag, 4, len(numbers))
        if len(body) == 4:
            directory += body
        else:
            directory += struct.pack(order + "I", start + 6 + 12 * len(tags) + len(values))
            values += body
    mark = {"<": b"II", ">": b"MM"}[order]
    header = mark + struct.pack(order + "HI", 42, start)
    return header + b"".join(strips) + directory + bytes(4) + values


def difference(path, expected, size=32, read=data.read_image):
    """The largest difference between what is read and what is expected."""
    image = read(path, size)
    assert image.shape == (size, size, 3) and image.dtype == np.uint8
    return np.abs(image.astype(int) - expected).max()


def refusal(path, read=data.read_image):
    """The message of the ValueError: one line that names the file."""
    with pytest.raises(ValueError) as error:
        read(path, 8)
    message = str(error.value)
    name = "".join(letter if letter.isprintable() else "?" for letter in Path(path).name)
    assert message.isprintable() and name[-20:] in message and "Errno" not in message
    return message


@pytest.mark.parametrize("mode, suffix, colour, expected", [
    ("CMYK", ".jpg", (0, 0, 0, 0), 255), ("L", ".png", 90, 90), ("1", ".png", 1, 255),
    ("RGB", ".bmp", (7, 7, 7), 7), ("LA", ".png", (0, 0), 255), ("P", ".png", 0, 255),
    ("RGBA", ".png", (255, 0, 0, 0), 255), ("LAB", ".tif", (255, 128, 128), 250)])
def test_modes(tmp_path, mode, suffix, colour, expected):
    """Of any size, also one pixel. What is transparent becomes white."""
    for size in ((9, 5), (1, 1)):
        options = dict(transparency=0) if mode == "P" else {}
        path = save(tmp_path / f"a{suffix}", Image.new(mode, size, colour), **options)
        assert difference(path, expected, 4) <= (5 if mode == "LAB" else 2)


def test_the_centre_square_is_read(tmp_path):
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    assert difference(save(tmp_path / "a.png", wide), 255, 10) == 0


def test_photoshop(tmp_path):
    """A regression test: Pillow counts its layers from 1, and we asked for number 0."""
    head = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 32, 32, 8, 3) + bytes(14)
    path = write(tmp_path / "a.psd", head + np.moveaxis(SCENE, 2, 0).tobytes())
    assert difference(path, SCENE) == 0


# ---------------------------------------------------------------------------------------------
# Files that are refused

def test_damaged_and_large_files(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = png(noise)
    garbled = bytearray(save(tmp_path / "garbled.tif", noise).read_bytes())
    garbled[12::7] = bytes(byte ^ 0x5a for byte in garbled[12::7])

    def claim(side):
        """A PNG that claims to be side x side pixels large."""
        header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
        return whole[:8] + chunk(b"IHDR", header) + whole[33:]

    for name, content, words in [
            ("empty.png", b"", "is empty"), ("half.png", whole[:len(whole) // 2], "truncated"),
            ("header.png", whole[:12], "looks like PNG"),
            ("header.webp", b"RIFF\x24\0\0\0WEBP", "looks like WebP"),
            ("garbled.tif", garbled, ""),                    # Pillow's versions find other faults
            ("large.png", claim(9_000), "9000 x 9000"),
            ("bomb.png", claim(20_000), "too many pixels")]:           # refused by Pillow itself
        assert words in refusal(write(tmp_path / name, content))


@pytest.mark.parametrize("content, words", [
    (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "is HEIC"),
    (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "is HEIC"),
    (b"\0\0\0\x18ftypisom\0\0\2\0isomiso2", "is a video"),
    (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom", "is a video"),
    (b"\0\0\0\x14ftypqt  \0\0\2\0qt  ", "is a video"),
    (b"\x1aE\xdf\xa3\x9fB\x86\x81", "is a video"),
    (b"RIFF\0\1\0\0AVI LIST", "is a video"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    (b"\n<!DOCTYPE html>\n<html><svg></svg></html>", "is a web page"),
    (b'{"message": "Not Found"}', "is text"), ("größer".encode(), "is text"),
    (b"<?xml version='1.0'?>\n<!-- drawn -->\n<svg width='9'>", "is SVG; convert it to PNG"),
    (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3", "is a PDF; convert it to PNG"),
    (b"\xff\x0a\xfa\x7f\x01\x90", "is JPEG XL"), (b"v/1\x01\2\0\0\0", "is OpenEXR"),
    (b"PK\3\4\x14\0\0\0", "is a ZIP archive"), (b"\x1f\x8b\x08\0\0", "compressed by gzip"),
    (bytes(2000), "not a picture"), (b"RIFF\0\1\0\0WAVEfmt ", "not a picture")],
    ids=lambda value: str(value[:16]))
def test_what_is_not_a_picture(tmp_path, content, words):
    """The message says what it is, whatever its suffix claims."""
    assert words in refusal(write(tmp_path / "a.png", content))


def test_avif_that_pillow_cannot_read(tmp_path):
    path = write(tmp_path / "a.avif", b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf" + bytes(40))
    assert "HEIC" not in refusal(path)


def test_formats_left_alone(tmp_path):
    """EPS would be handed to Ghostscript; the values of FITS mean nothing without their scale."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n\n\n"
    cards = ["SIMPLE  =                    T", "BITPIX  =                   16",
             "NAXIS   =                    2", "NAXIS1  =                   32",
             "NAXIS2  =                   32", "BZERO   =                32768", "END"]
    fits = "".join(card.ljust(80) for card in cards).ljust(2880).encode() + bytes(2880)
    for name, content, words in [("a.eps", eps, "EPS"), ("a.fits", fits, "FITS")]:
        assert f"{words}; convert it to PNG" in refusal(write(tmp_path / name, content))


def progressive_jpeg(scans):
    """A progressive JPEG whose last scan is repeated until there are so many."""
    file = io.BytesIO()
    Image.fromarray(SCENE).save(file, "JPEG", progressive=True)
    whole = file.getvalue()
    last = whole[whole.rindex(b"\xff\xda"):-2]
    return whole[:-2] + last * (scans - whole.count(b"\xff\xda")) + whole[-2:]


def test_a_jpeg_of_many_scans(tmp_path):
    """Each costs a pass over the picture. Those after its end or in a thumbnail do not count."""
    path = write(tmp_path / "a.jpg", progressive_jpeg(1000))
    assert "1000 scans" in refusal(path)
    data.read_image(write(path, progressive_jpeg(20)), 8)
    data.read_image(write(path, progressive_jpeg(20) + b"\xff\xda" * 200), 8)
    save(path, SCENE, exif=b"Exif\0\0" + b"\xff\xda" * 200)
    data.read_image(path, 8)


# ---------------------------------------------------------------------------------------------
# Paths

@pytest.mark.parametrize("name, words", [
    ("missing.png", "no picture at"), ("x" * 300 + ".png", "name is too long"),
    ("a\0b.png", "cannot be a name"), ("", "is a folder"), ("pipe.png", "a device or a pipe"),
    ("circle.png", "links go in a circle"), ("two\nlines.png", "no picture at")])
def test_a_path_that_is_no_file(tmp_path, name, words):
    """In our own words, and without waiting for a pipe to which nothing is written."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "circle.png").symlink_to(tmp_path / "circle.png")
    assert words in refusal(tmp_path / name)
    if name and name != "pipe.png":
        for what in ("text file", "folder of pictures"):
            refusal(tmp_path / name, lambda path, _, what=what: reading.check_path(path, what))


def test_permissions(tmp_path, monkeypatch):
    """Whether the system says so at once or, as network disks do, when the file is opened."""
    path = save(tmp_path / "a.png", SCENE)

    def deny(*_):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        assert "change its permissions" in refusal(path)
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", deny)
        assert "change its permissions" in refusal(path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", deny)
        assert "permission to look into its folder" in refusal(path, reading.check_path)


# ---------------------------------------------------------------------------------------------
# Colours told by a profile

# A minimal ICC v2 profile of Display P3: three columns at D50 and one gamma, 2.2
P3 = zlib.decompress(base64.b85decode(
    "c-muNU_6kMoLkH!z`&53S5g$@?xYYA8KuC01QL^r3mEW%Z`T+YLG)!^2GRjXN@{U3kbVNhG36x%B@7IV4nVd@5zr"
    "w(b_j@_4q<12*hvs}4OmS`kTZ}y0mv3ehp-ob*hvuf1`r!+J_s-sFi;mD!U_=v2(jjS3=FpW|NsBL10m*hkbz;N2"
    "?GPyE`*qd1p|X1F9XAg-N~gzWl*CTnT#122=M`gG&T4"))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
def test_profiles_become_srgb(tmp_path, suffix):
    """A colour written in Display P3 is read as that colour, not by its bare numbers."""
    flat, srgb = Image.new("RGB", (16, 16), COLOUR), ImageCms.createProfile("sRGB")
    wide = ImageCms.profileToProfile(flat, srgb, io.BytesIO(P3))
    assert np.abs(np.asarray(wide)[0, 0].astype(int) - COLOUR).max() > 20
    for mode in ("RGB",) if suffix == ".jpg" else ("RGB", "RGBA"):
        path = save(tmp_path / f"a{suffix}", wide.convert(mode), icc_profile=P3)
        assert difference(path, COLOUR) <= 4


def test_a_profile_that_does_not_fit_is_ignored(tmp_path):
    """Damaged, or of another space. A profile of RGB serves for grey; one of grey not for RGB."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    grey = srgb[:16] + b"GRAY" + srgb[20:]
    colour = Image.new("RGB", (8, 8), COLOUR)
    for name, image, profile, expected in [
            ("a.png", colour, b"no profile", COLOUR), ("b.png", colour, P3[:200], COLOUR),
            ("c.jpg", Image.new("CMYK", (8, 8)), P3, 255), ("d.png", colour, grey, COLOUR),
            ("e.png", Image.new("L", (8, 8), 90), srgb, 90)]:
        assert difference(save(tmp_path / name, image, icc_profile=profile), expected) <= 1


# ---------------------------------------------------------------------------------------------
# Colours told by codes and numbers. The expected side is written from the standards, not from ours

PRIMARIES = {                           # code of ITU-T H.273: x and y of white, red, green, blue
    1: (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06),
    9: (0.3127, 0.3290, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046),
    12: (0.3127, 0.3290, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060)}
ADOBE = (0.3127, 0.3290, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)


def to_xyz(primaries):
    white, red, green, blue = ([x / y, 1, (1 - x - y) / y]
                               for x, y in zip(primaries[::2], primaries[1::2], strict=True))
    columns = np.transpose([red, green, blue])
    return columns * np.linalg.solve(columns, white)


def light_of(image, primaries):
    """sRGB (height, width, 3), 0 to 255 -> light in other primaries, 0 to 1."""
    signal = image / 255
    light = np.where(signal > 0.04045, ((signal + 0.055) / 1.055) ** 2.4, signal / 12.92)
    matrix = np.linalg.inv(to_xyz(primaries)) @ to_xyz(PRIMARIES[1])
    return (light @ matrix.T).clip(0, 1)


def encode_srgb(light):
    return np.where(light > 0.0031308, 1.055 * light ** (1 / 2.4) - 0.055, light * 12.92)


def encode_pq(light):
    power = (light * 203 / 10_000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def encode_hlg(light):
    """Its inverse OOTF has the exponent 1.2 for a screen of 1,000 nits."""
    screen = light * 203 / 1000
    luminance = (screen @ [0.2627, 0.6780, 0.0593]).clip(1e-9)
    scene = screen * luminance[..., None] ** (1 / 1.2 - 1)
    bright = 0.17883277 * np.log((12 * scene - 0.28466892).clip(1e-9)) + 0.55991073
    return np.where(scene > 1 / 12, bright, np.sqrt(3 * scene))


def samples(signal, bits=16):
    """0 to 1 -> the integers of a file."""
    kind = np.uint16 if bits > 8 else np.uint8
    return (signal * (2 ** bits - 1)).round().astype(kind)


TRANSFERS = {8: lambda light: light, 13: encode_srgb, 16: encode_pq, 18: encode_hlg}


@pytest.mark.parametrize("primaries", [1, 9, 12])
@pytest.mark.parametrize("transfer", TRANSFERS)
def test_colours_by_code(tmp_path, primaries, transfer):
    """PNG's cICP chunk, at 16 bits, also for grey and with alpha; at 8 bits it is coarser."""
    cicp = chunk(b"cICP", bytes([primaries, transfer, 0, 1]))
    signal = TRANSFERS[transfer](light_of(SCENE, PRIMARIES[primaries]))
    path = tmp_path / "a.png"
    assert difference(write(path, png(samples(signal), cicp)), SCENE) <= 1
    opaque = np.ones((32, 32, 1))
    opaque[:, 16:] = 0
    layers = samples(np.concatenate([signal, opaque], 2))
    assert difference(write(path, png(layers, cicp)), np.where(opaque, SCENE, 255)) <= 1
    grey = TRANSFERS[transfer](light_of(GREY.repeat(3, 2), PRIMARIES[1]))[..., :1]
    assert difference(write(path, png(samples(grey), cicp)), GREY) <= 1
    if transfer != 8:
        assert difference(write(path, png(samples(signal, 8), cicp)), SCENE) <= 12


def test_a_code_outranks_a_profile(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = chunk(b"iCCP", b"name\0\0" + zlib.compress(srgb))
    signal = samples(encode_srgb(light_of(SCENE, PRIMARIES[12])))
    path = write(tmp_path / "a.png", png(signal, chunk(b"cICP", b"\x0c\x0d\0\1"), profile))
    assert difference(path, SCENE) <= 1


def test_codes_of_other_kinds(tmp_path):
    """Video levels are stretched, what is unspecified is sRGB, and what is unknown is refused."""
    path = tmp_path / "a.png"
    levels = (16 + SCENE / 255 * 219) / 255
    path = write(path, png(samples(levels), chunk(b"cICP", bytes([1, 13, 0, 0]))))
    assert difference(path, SCENE) <= 1
    path = write(path, png(SCENE, chunk(b"cICP", bytes([2, 2, 0, 1]))))
    assert difference(path, SCENE) == 0
    for codes in ([10, 13, 0, 1], [1, 9, 0, 1]):
        path = write(path, png(SCENE, chunk(b"cICP", bytes(codes))))
        assert "convert it to sRGB" in refusal(path)
    path = write(path, png(SCENE, chunk(b"cICP", bytes([9, 16, 0, 1]))[:-1] + b"?"))
    assert difference(path, SCENE) == 0                      # its checksum is wrong


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow does not read AVIF")
def test_colours_of_avif(tmp_path):
    signal = samples(encode_pq(light_of(SCENE, PRIMARIES[12])), 8)
    path = save(tmp_path / "a.avif", signal, quality=100, subsampling="4:4:4")
    before, mark, after = path.read_bytes().partition(b"colrnclx")
    write(path, before + mark + struct.pack(">HH", 12, 16) + after[4:])
    assert np.abs(data.read_image(path, 32).astype(int) - SCENE).mean() < 4


def gama(gamma):
    return chunk(b"gAMA", struct.pack(">I", round(gamma * 100_000)))


def chrm(primaries):
    return chunk(b"cHRM", struct.pack(">8I", *[round(value * 100_000) for value in primaries]))


@pytest.mark.parametrize("gamma", [0.45455, 1, 1 / 1.8, None])
@pytest.mark.parametrize("primaries", [PRIMARIES[12], ADOBE, None])
def test_colours_by_chromaticity_and_gamma(tmp_path, gamma, primaries):
    """PNG's cHRM and gAMA chunks, alone and together."""
    light = light_of(SCENE, primaries or PRIMARIES[1])
    chunks = [chrm(primaries)] if primaries else []
    signal = encode_srgb(light)                              # 0.45455 is how writers say sRGB
    if gamma is not None:
        chunks.append(gama(gamma))
        if gamma > 0.5:
            signal = light ** gamma
    path = write(tmp_path / "a.png", png(samples(signal), *chunks))
    assert difference(path, SCENE) <= 1


def test_chromaticities_of_srgb_change_nothing(tmp_path):
    """Nor do those that make no sense, nor any together with an sRGB chunk."""
    line, zero = (0.3, 0.3) * 4, (0,) * 8
    point = (*PRIMARIES[1][:2], 1e-5, 1e-5, 1e-5, 2e-5, 0.15, 0.06)
    for chunks in ([gama(0.45455), chrm(PRIMARIES[1])], [chrm(line)], [chrm(zero), gama(0)],
                   [chrm(point)], [chunk(b"sRGB", b"\0"), chrm(ADOBE), gama(1)]):
        assert difference(write(tmp_path / "a.png", png(SCENE, *chunks)), SCENE) == 0


def test_adobe_rgb_by_exif(tmp_path):
    """Cameras embed no profile for it, only the word R03."""
    exif = Image.Exif()
    exif[0x8769] = {0xA001: 65535, 0xA005: {1: "R03"}}
    signal = samples(light_of(SCENE, ADOBE) ** (256 / 563), 8)
    for suffix in (".jpg", ".png", ".webp"):
        image = data.read_image(save(tmp_path / f"a{suffix}", signal, exif=exif), 32)
        assert np.abs(image.astype(int) - SCENE).mean() < 1.5


# ---------------------------------------------------------------------------------------------
# Samples of more than 8 bits

RAMP = np.tile(np.linspace(0, 1, 16), (16, 1))
EIGHT = (RAMP * 255).round()[..., None]


@pytest.mark.parametrize("suffix, top, kind, tags, share", [
    (".png", 65535, np.uint16, {}, 1), (".pgm", 65535, np.uint16, {}, 1),
    (".tif", 4095, np.uint16, {}, 1),                       # 12 bits, with a note, not all black
    (".tif", 4095, np.uint16, {281: 65535}, 1 / 16),        # and this is truly dark
    (".tif", 65535, np.uint16, {281: 255}, 1),              # a mistake: its values are larger
    (".tif", 1, np.float32, {}, 1), (".tif", 1.2, np.float32, {341: 1.2}, 1),
    (".tif", 8, np.float32, {281: 8}, 1), (".tif", 1e6, np.int32, {341: 1e6}, 1)])
def test_greys_are_scaled_by_what_the_file_says(tmp_path, suffix, top, kind, tags, share, capsys):
    pixels = (RAMP * top).astype(kind) if kind == np.float32 else (RAMP * top).round().astype(kind)
    path = save(tmp_path / f"a{suffix}", pixels, **dict(tiffinfo=tags) if tags else {})
    assert difference(path, EIGHT * share, 16) <= 1
    assert ("read as 12 bits" in capsys.readouterr().err) == (top == 4095 and not tags)
    if tags == {281: 65535}:                                # where white is zero: the negative
        path = save(path, pixels, tiffinfo=tags | {262: 0})
        assert difference(path, 255 - EIGHT * share, 16) <= 1


@pytest.mark.parametrize("value, expected", [(0x8000, 128), (0xffff, 255), (900, 3.5), (200, 1)])
def test_a_flat_dark_picture_stays_dark(tmp_path, value, expected):
    """Of one value, nothing can be guessed. The same in colour, with three values."""
    path = save(tmp_path / "a.png", np.full((4, 4), value, np.uint16))
    assert difference(path, expected) <= 1
    colour = np.uint16([value, value // 2, value // 4])
    path = write(tmp_path / "b.png", png(np.tile(colour, (4, 4, 1))))
    assert difference(path, colour / 257) <= 1


@pytest.mark.parametrize("pixels", [RAMP * 1.2, -RAMP]
                         + [(RAMP * top).astype(np.int32) for top in (1e6, 0, -1e6)])
def test_greys_that_do_not_say(tmp_path, pixels):
    """They are refused rather than read by a guess, or as black."""
    pixels = pixels if pixels.dtype == np.int32 else pixels.astype(np.float32)
    assert "which value is white" in refusal(save(tmp_path / "a.tif", pixels))
    for bad in (np.nan, np.inf):
        pixels = RAMP.astype(np.float32)
        pixels[3, 3] = bad
        assert "NaN" in refusal(save(tmp_path / "a.tif", pixels))


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_colours_in_16_bits_by_the_largest_value(tmp_path, bits, order):
    """TIFF's MaxSampleValue: 14 bits were read at a quarter of their light."""
    white, path = 2 ** bits - 1, tmp_path / "a.tif"
    colours, clear = samples(SCENE / 255, bits), np.zeros((32, 32, 1), np.uint16)
    write(path, tiff(colours, order, white=white))
    assert difference(path, SCENE) <= 1
    write(path, tiff(colours, order, white=white, packed=True))
    assert difference(path, SCENE) <= 1
    write(path, tiff(np.concatenate([white - colours, clear], 2), order, 5, white=white))    # CMYK
    assert difference(path, SCENE) <= 2
    for opaque in (white, 65535):
        alpha = clear + np.uint16(opaque)
        alpha[:, 16:] = 0
        write(path, tiff(np.concatenate([colours, alpha], 2), order, extra=2, white=white))
        assert difference(path, np.where(alpha, SCENE, 255)) <= 1


def test_colours_of_12_bits_that_do_not_say(tmp_path, capsys):
    """As for greys, and with a note."""
    colours = samples(SCENE / 255, 12)
    for name, content in [("a.tif", tiff(colours)), ("a.png", png(colours))]:
        assert difference(write(tmp_path / name, content), SCENE) <= 1
        assert "read as 12 bits" in capsys.readouterr().err


def test_16_bits_that_pillow_cannot_give(tmp_path):
    """Planes, or colours multiplied by alpha: refused where 8 bits are not enough, or are wrong."""
    colours, path = samples(SCENE / 255), tmp_path / "a.tif"
    dark = samples(SCENE / 255, 14)
    assert "plane by plane" in refusal(write(path, tiff(colours, planar=True)))
    assert difference(write(path, tiff(colours, planar=True, packed=True)), SCENE) <= 1
    for content in (tiff(dark, planar=True, packed=True, white=16383),
                    tiff(np.concatenate([dark, dark[..., :1]], 2), extra=1, white=16383)):
        assert "only 8 bits" in refusal(write(path, content))


@pytest.mark.parametrize("bits", [10, 12, 14])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_significant_bits_of_png(tmp_path, bits, channels):
    """Its sBIT chunk. By the standard, samples are scaled up to 16 bits; some writers do not."""
    significant = chunk(b"sBIT", bytes([bits] * channels))
    path = tmp_path / "a.png"
    for image in (SCENE, SCENE // 16):                       # dark: below 4,096 of 65,535
        if channels < 3:
            image = image[..., :1]
        small = samples(image / 255, bits)
        if channels in (2, 4):
            opaque = np.full((32, 32, 1), 2 ** bits - 1, np.uint16)
            small = np.concatenate([small, opaque], 2)
        shifted = small << (16 - bits)
        repeated = shifted | (small >> (2 * bits - 16))
        multiplied = (small * (65535 / (2 ** bits - 1))).round().astype(np.uint16)
        for scaled in (small, shifted, repeated, multiplied):
            assert difference(write(path, png(scaled, significant)), image) <= 1


@pytest.mark.parametrize("channels", [1, 3])
def test_a_transparent_colour_of_16_bits(tmp_path, channels):
    """PNG's tRNS chunk: that colour, and none that has the same upper bytes."""
    image = samples(SCENE[..., :channels] / 255)
    key = image[0, 0].copy()
    image[0:8, 8:16] = key ^ 1
    expected = np.where((image == key).all(2, keepdims=True), 255, image / 257)
    content = png(image, chunk(b"tRNS", struct.pack(f">{channels}H", *key)))
    assert difference(write(tmp_path / "a.png", content), expected) <= 1


# ---------------------------------------------------------------------------------------------
# Metadata

@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_upright(tmp_path, turn, suffix):
    """All eight orientations, with 16 bits as well."""
    exif = Image.Exif()
    exif[0x112] = turn
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}       # Pillow's methods that turn it so
    image = Image.fromarray(SCENE)
    stored = image.transpose(Image.Transpose(undo[turn])) if turn > 1 else image
    assert difference(save(tmp_path / f"a{suffix}", stored, exif=exif), SCENE) == 0
    grey = np.asarray(stored)[..., 0].astype(np.uint16) * 257
    assert difference(save(tmp_path / "b.png", grey, exif=exif), SCENE[..., :1]) == 0


@pytest.mark.parametrize("name", [b"exif", b"APP1"])
def test_upright_by_a_raw_profile(tmp_path, name):
    """ImageMagick writes EXIF data into a text chunk of PNG, as hexadecimal digits."""
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x03\0\0\0\0\0\0"
    stored = SCENE[::-1, ::-1]
    for digits, expected in [(exif.hex().encode(), SCENE), (b"zzzz", stored)]:
        body = b"Raw profile type %s\0\n%s\n  %d\n%s\n" % (name, name, len(exif), digits)
        path = write(tmp_path / "a.png", png(stored, chunk(b"tEXt", body)))
        assert difference(path, expected) == 0


@pytest.mark.parametrize("bad", [
    chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x02ab\0\0"),   # turned by "ab"
    chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0\xff\xfe<tiff:Orientation=\"\xff6"),
    chunk(b"zTXt", b"a\0\0" + zlib.compress(b" " * 70_000_000)),              # not to be unpacked
    chunk(b"tEXt", b"a\0b")[:-4] + b"\0\0\0\0",                               # a wrong checksum
    chunk(b"tEXt", b"transparency\0none"),                  # a name that Pillow uses for itself
    chunk(b"gAMA", b"\0"), chunk(b"iCCP", b"p\0\0nonsense")], ids=lambda bad: str(bad[4:16]))
def test_bad_metadata_never_refuses_a_good_picture(tmp_path, bad):
    """Other metadata that is intact still counts."""
    assert difference(write(tmp_path / "a.png", png(SCENE, bad)), SCENE) == 0
    exif = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"
    assert difference(save(tmp_path / "a.jpg", SCENE, exif=exif), SCENE) < 16
    if bad[4:8] not in (b"gAMA", b"iCCP"):                   # these would be of the colours
        signal = samples(light_of(SCENE, ADOBE))
        path = write(tmp_path / "b.png", png(signal, chrm(ADOBE), gama(1), bad))
        assert difference(path, SCENE) <= 1


# ---------------------------------------------------------------------------------------------
# Frames

@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".tif"])
def test_the_first_frame_that_shows_something(tmp_path, suffix):
    """Neither a blank one nor one with a speck of dust. Later ones may be damaged."""
    white = SCENE | 255
    dust = white.copy()
    dust[3, 3] = 0
    frames = (white, dust, SCENE, SCENE[::-1].copy())
    blank, dust, scene, other = (Image.fromarray(frame) for frame in frames)
    for frames in ([blank, blank, scene, other], [dust, scene, other], [scene, other, blank]):
        path = save(tmp_path / f"a{suffix}", frames[0], save_all=True, append_images=frames[1:])
        assert np.abs(data.read_image(path, 32).astype(int) - SCENE).mean() < 4
    path.write_bytes(path.read_bytes()[:-300 if suffix == ".gif" else None])
    assert np.abs(data.read_image(path, 32).astype(int) - SCENE).mean() < 4


def test_the_size_of_every_page_is_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_PIXELS", 5000)
    blank, large = Image.new("L", (64, 64), 255), Image.new("L", (100, 80))
    path = save(tmp_path / "a.tif", blank, save_all=True, append_images=[large])
    assert "100 x 80 in frame 2" in refusal(path)


def test_a_depth_map_is_not_a_frame(tmp_path):
    """A phone's JPEG may hold one behind the photograph. A white photograph stays white."""
    blank, depth = Image.new("RGB", (32, 32), "white"), Image.fromarray(SCENE)
    path = save(tmp_path / "a.mpo", blank, save_all=True, append_images=[depth])
    assert difference(path, 255) == 0


# ---------------------------------------------------------------------------------------------
# Transparency, and pictures that show nothing

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
    assert ("laid on a dark one" in capsys.readouterr().err) == (background == 48)
    drawing.paste((255, 255, 255, 255), (0, 0, 16, 32))      # a snowman with a black hat:
    drawing.paste((0, 0, 0, 255), (0, 0, 16, 4))             # seen on white
    assert (data.read_image(save(tmp_path / "b.png", drawing), 32)[10, 30] == 255).all()


def test_an_opaque_drawing_gets_no_background(tmp_path, capsys):
    """A few strokes on white paper, whose alpha is opaque everywhere, or all but the corners."""
    paper = np.full((64, 64, 4), 255, np.uint8)
    paper[30:32, 8:56, :3] = 60
    assert difference(save(tmp_path / "a.png", paper), paper[..., :3], 64) == 0
    for corner in (np.s_[:4, :4], np.s_[-4:, -4:]):
        paper[corner] = (255, 255, 255, 0)
    assert difference(save(tmp_path / "b.png", paper), paper[..., :3], 64) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("mode", ["RGBA", "P", "I;16"])
def test_large_pictures_take_little_memory(tmp_path, mode):
    """NumPy's share of it: 24 bytes a pixel once, for 64-bit copies of all pixels."""
    side = 2400
    image = Image.new(mode, (side, side))
    options = dict(transparency=0) if mode == "P" else {}
    path = save(tmp_path / "a.png", image, **options)
    tracemalloc.start()
    data.read_image(path, 8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 9 * side * side


def test_a_reference_of_one_colour(tmp_path):
    """It is refused, but read as a training picture. A small object is enough of a reference."""
    wide, small = Image.new("RGB", (300, 20), "white"), Image.new("RGB", (64, 64), "white")
    wide.paste("red", (0, 0, 60, 20))
    small.paste("navy", (30, 30, 36, 36))
    faint = np.random.default_rng(0).integers(250, 256, (32, 32, 3), dtype=np.uint8)
    for image, words, advice in [
            (wide, "its centre square", "crop the picture"), (faint, "the picture", "another"),
            (Image.new("RGBA", (32, 32)), "the picture", "another")]:
        path = save(tmp_path / "a.png", image)
        data.read_image(path, 8)
        message = refusal(path, data.read_reference)
        assert words in message and advice in message
    data.read_reference(save(tmp_path / "b.png", small), 64)
