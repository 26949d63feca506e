"""A folder of the user's own pictures with captions, for training a base."""

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from .reading import check_path, read_image

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")


class Folder:
    """Pictures with captions: NAME.txt next to each NAME.png, or captions.tsv (file, caption).

    `.skipped` names everything else in the folder, such as notes, subfolders, hidden files, and
    pictures that captions.tsv does not list. `.fingerprint` changes with any picture or caption.
    Raises ValueError, with a one-line message, if the folder, a picture or a caption is missing.
    """

    def __init__(self, path, size=64):
        path = Path(path)
        check_path(path, "folder of pictures")
        table = path / "captions.tsv"
        if table.exists():
            pairs = read_captions(table)
        else:
            pairs = read_caption_files(path)
        if not pairs:
            raise ValueError(f"{path} contains no pictures with captions")
        for file, words in pairs:
            if not words:
                raise ValueError(f"{file} has an empty caption; say what it shows")
        self.images = np.stack([read_image(file, size) for file, _ in pairs])
        used = {file.resolve() for file, _ in pairs} | {table.resolve()}
        used |= {file.with_suffix(".txt").resolve() for file, _ in pairs}
        self.skipped = sorted(file.name for file in path.iterdir() if file.resolve() not in used)
        self.captions = [words for _, words in pairs]
        digest = hashlib.sha256(self.images.tobytes())
        digest.update("\n".join(self.captions).encode())
        self.fingerprint = digest.hexdigest()[:12]

    def batch(self, n, rng, resolution):
        """n pictures and captions as in Art.batch; the pictures keep the style they have."""
        picks = rng.integers(len(self.images), size=n)
        images = [Image.fromarray(self.images[i]).resize((resolution, resolution), Image.BICUBIC)
                  for i in picks]
        return np.stack(images), [self.captions[i] for i in picks]

    def words(self):
        """All words of the captions, sorted."""
        return sorted({word for line in self.captions for word in line.lower().split()})

    def prompts(self, n):
        """n captions to sample images for, always the same."""
        return [self.captions[i % len(self.captions)] for i in range(n)]


def read_captions(table):
    """The rows of captions.tsv -> [(path of the picture, its caption)]."""
    pairs = []
    for number, line in enumerate(read_text(table).splitlines(), 1):
        file, tab, words = line.partition("\t")
        if line.strip() and file.strip() != "file":          # skip the header row
            if not tab and not (table.parent / file.strip()).exists():
                raise ValueError(f"{table}, line {number}, has no tab between file and caption; "
                                 "put one there")
            pairs.append((table.parent / file.strip(), " ".join(words.split())))
    return pairs


def read_caption_files(path):
    """NAME.txt next to each picture -> [(path of the picture, its caption)]."""
    pairs = []
    for file in sorted(path.iterdir()):
        if file.name.startswith(".") or file.suffix.lower() not in SUFFIXES:
            continue                                         # ._NAME.png are macOS's notes
        caption_file = file.with_suffix(".txt")
        if not caption_file.exists():
            raise ValueError(f"{file} has no caption; write {caption_file.name} next to it")
        pairs.append((file, read_text(caption_file)))
    return pairs


def read_text(path):
    """A text file of the user's, without a byte-order mark. Raises ValueError if unreadable."""
    check_path(path, "text file")
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; save it as UTF-8") from None
