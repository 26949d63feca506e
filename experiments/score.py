"""The two scores of StyleDrop's Table 2, for a folder of pictures (Section 4.2.1).

    python experiments/score.py --images DIR --ref style.png --prompts prompts.txt
    python experiments/score.py ... --clip ViT-L-14.pt --merges bpe_simple_vocab_16e6.txt.gz
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
from clip_feedback import load_clip, style_score, text_score  # noqa: E402
from commandline import Parser, run_command  # noqa: E402
from experiments.common import mean_and_error  # noqa: E402
from styledrop import to_tensor  # noqa: E402


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--images", required=True, metavar="DIR", help="pictures, read in the order of their names")
    add("--ref", nargs="+", required=True, metavar="IMG", help="the style reference, or several")
    add("--prompts", required=True, metavar="FILE",
        help="one prompt a line: for each picture, or one for all")
    add("--clip", default="weights/tiny/clip.pt",
        help="our checkpoint, or OpenAI's or open_clip's ViT weights")
    add("--merges", help="OpenAI's vocabulary file, for foreign weights")
    args = parser.parse_args()
    if not Path(args.images).is_dir():
        raise ValueError(f"{args.images} is not a folder of pictures")
    suffixes = data.Folder.SUFFIXES
    files = sorted(p for p in Path(args.images).iterdir() if p.suffix.lower() in suffixes)
    lines = data.read_words(Path(args.prompts)).splitlines()
    prompts = [line.strip() for line in lines if line.strip()]
    if not files:
        raise ValueError(f"{args.images} holds no pictures")
    if len(prompts) not in (1, len(files)):
        raise ValueError(f"{args.images} holds {len(files)} pictures, {args.prompts} "
                         f"{len(prompts)} prompts: write one for each")
    clip = load_clip(args.clip, args.merges)
    size = clip.config.resolution
    read = lambda paths: torch.cat([to_tensor(data.read_image(p, size)[None]) for p in paths])
    images = read(files)
    texts = prompts * (len(files) // len(prompts))
    for name, scores in (("text", text_score(clip, images, texts)),
                         ("style", style_score(clip, images, read(args.ref)))):
        mean, error = mean_and_error(scores.cpu())
        print(f"{name} score {mean:.4f} +- {error:.4f}  "
              f"({len(scores)} pictures, by {args.clip})")


if __name__ == "__main__":
    run_command(main)
