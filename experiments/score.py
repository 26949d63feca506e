"""The two scores of StyleDrop's Table 2 for a folder of images (Section 4.2.1).

    python -m experiments.score --images DIR --ref style.png --prompts prompts.txt
    python -m experiments.score ... --clip ViT-L-14.pt --merges bpe_simple_vocab_16e6.txt.gz

The text score is the cosine of CLIP's features of an image and of its prompt; the style score is
that of an image and of the reference. Images are taken in natural order of their names (1, 2, 10),
and each is printed with its prompt.
"""

import re
import warnings
from pathlib import Path

import torch

from checkpoint.clip import load_clip
from clip_feedback import style_score, text_score
from commandline.options import Parser, filled
from commandline.terminal import note, run_command, say
from data.folder import SUFFIXES, read_text
from data.reading import read_image
from experiments.common import mean_and_error
from styledrop import WEIGHTS, to_tensor


def natural_order(path):
    """A key by which "2.png" comes before "10.png"."""
    pieces = re.split(r"([0-9]+)", path.name.lower())        # text, digits, text, digits, ..., text
    pieces[1::2] = [int(digits) for digits in pieces[1::2]]
    return pieces, path.name                                 # "7.png" and "07.png" differ


def find_images(folder):
    """The images of a folder and everything else in it, each in natural order."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder of images")
    images = []
    skipped = []
    for path in sorted(folder.iterdir(), key=natural_order):
        if path.is_file() and path.suffix.lower() in SUFFIXES:
            images.append(path)
        else:
            skipped.append(path)
    if not images:
        raise ValueError(f"{folder} contains no images")
    return images, skipped


def read_prompts(path, count):
    """The prompts of `count` images: as many lines of a text file, or one line for all."""
    lines = [line.strip() for line in read_text(Path(path)).splitlines()]
    prompts = [line for line in lines if line]
    if len(prompts) not in (1, count):
        raise ValueError(f"there are {count} images, but {path} contains {len(prompts)} prompts; "
                         "write one for each image, or one for all")
    if len(prompts) == 1:
        prompts = prompts * count
    return prompts


def read_images(paths, size):
    """(B, 3, size, size) in [-1, 1]."""
    return torch.cat([to_tensor(read_image(path, size)[None]) for path in paths])


def options():
    """The command's options."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--images", type=filled, required=True, metavar="DIR", help="the folder of the images")
    add("--ref", type=filled, nargs="+", required=True, metavar="IMG",
        help="the style reference, or several")
    add("--prompts", type=filled, required=True, metavar="FILE",
        help="a text file with one prompt per line: one for each image, or one for all")
    add("--clip", type=filled, default=str(Path(WEIGHTS) / "clip.pt"),
        help="our checkpoint, or the weights of a ViT by OpenAI or open_clip "
             "(default: the one that ships)")
    add("--merges", type=filled, help="OpenAI's vocabulary file, for weights that are not ours")
    return parser


def main():
    args = options().parse_args()
    paths, skipped = find_images(args.images)
    prompts = read_prompts(args.prompts, len(paths))
    clip = load_clip(args.clip, args.merges)
    images = read_images(paths, clip.config.resolution)
    references = read_images(args.ref, clip.config.resolution)
    with warnings.catch_warnings(record=True) as cut:        # CLIP's, of prompts that are too long
        text = text_score(clip, images, prompts)
    style = style_score(clip, images, references)

    for warning in cut:
        note(str(warning.message))
    for path in skipped:
        say(f"skipped, since it is not an image: {path.name}")
    say("text   style  image and prompt")
    for path, prompt, of_text, of_style in zip(paths, prompts, text.tolist(), style.tolist()):
        say(f"{of_text:5.3f}  {of_style:5.3f}  {path.name}  {prompt}")
    for name, scores in (("text", text), ("style", style)):
        mean, error = mean_and_error(scores.cpu())
        words = f"{mean:.4f}" if len(scores) == 1 else f"{mean:.4f} +- {error:.4f}"
        say(f"{name} score {words}  (images: {len(scores)}, by {args.clip})")


if __name__ == "__main__":
    run_command(main)
