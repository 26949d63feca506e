"""Split the foreign pictures at random into validation ("chosen") and test ("reported") pictures.

    python experiments/foreign/lot.py           # fills the column `used` of table.tsv

Within each kind, the sorted file names are shuffled with a fixed seed and assigned to test and
validation in turn. Each kind has its own generator, so that a new picture of one kind does not
change the split of the others.
"""

import csv
from pathlib import Path

import numpy as np

TABLE = Path(__file__).resolve().parent / "table.tsv"
SEED = 2306
PARTS = "reported", "chosen"            # test; validation, on which settings are chosen


def draw(rows):
    """{file name: part} for the rows of the table."""
    used = {}
    for kind in sorted({row["kind"] for row in rows}):
        names = sorted(row["file"] for row in rows if row["kind"] == kind)
        order = np.random.default_rng(SEED).permutation(len(names))
        for turn, k in enumerate(order):
            used[names[k]] = PARTS[turn % 2]
    return used


def main():
    with open(TABLE, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        columns = reader.fieldnames
        rows = list(reader)
    used = draw(rows)
    lines = ["\t".join(columns)]
    for row in rows:
        row["used"] = used[row["file"]]
        lines.append("\t".join(row[column] for column in columns))
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
