"""Which foreign pictures choose the tuning recipe, and which are only reported: by lot.

    python experiments/foreign/lot.py           # fills the column `used` of table.tsv

Within each kind the file names, sorted, are shuffled with a fixed seed; the first is reported, the
second chooses, and so on in turn. Each kind has its own generator: a picture more in one kind
changes nothing in the others.
"""

import csv
from pathlib import Path

import numpy as np

TABLE = Path(__file__).resolve().parent / "table.tsv"
SEED = 2306
PARTS = "reported", "chosen"


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
