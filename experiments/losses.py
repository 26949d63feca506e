"""The table "is my loss normal?" from the logs of the shipped runs.

    python experiments/losses.py            # writes experiments/results/losses.md
"""

import json
import math
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHANCE = {"vqgan": "one code for all: usage 1/1024, perplexity 1",
          "clip": f"guessing among 128: loss ln 128 = {math.log(128):.2f}, accuracy 0.008",
          "muse": f"guessing among 1,024 tokens: loss ln 1024 = {math.log(1024):.2f}, accuracy 0.001"}


def main():
    lines = []
    for stage, chance in CHANCE.items():
        log = [json.loads(line) for line in open(ROOT / "weights" / "tiny" / f"{stage}.jsonl")]
        names = [name for name in log[-1] if name not in ("step", "images", "minutes", "critic")]
        lines += [f"`--stage {stage}` ({chance})", "", "| minutes | images | " + " | ".join(names) + " |",
                  "|---" * (2 + len(names)) + "|"]
        for share in (0.02, 0.05, 0.2, 0.5, 1):
            line = min(log, key=lambda line: abs(line["step"] - share * log[-1]["step"]))
            lines.append(f"| {line['minutes']:.0f} | {line['images']:,} | " + " | ".join(f"{line[n]:.3g}" for n in names) + " |")
        lines.append("")
    text = "\n".join(lines)
    (ROOT / "experiments" / "results").mkdir(exist_ok=True)
    (ROOT / "experiments" / "results" / "losses.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
