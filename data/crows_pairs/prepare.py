"""CrowS-Pairs: pairs of sentences about two groups of people, one of them a stereotype. For eval.py --bias.
Fields: sent_more (the stereotyped sentence), sent_less, stereo_antistereo (the direction), bias_type.

For      measuring biases of language models (Nangia et al. 2020, arXiv 2010.00133)
Rows     test 1,508
Licence  CC BY-SA 4.0
From     github.com/nyu-mll/crows-pairs, data/crows_pairs_anonymized.csv

The sentences are offensive. Many pairs measure no stereotype well (Blodgett et al. 2021, "Stereotyping Norwegian
Salmon"): a score on them is a hint. The address was written down without being tried.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this runs as a script, from anywhere

from data.prepare import PublicFile, Row, parse_arguments, read_files, text, write_splits  # noqa: E402
from minift.errors import run_script  # noqa: E402

URL = "https://raw.githubusercontent.com/nyu-mll/crows-pairs/master/data/crows_pairs_anonymized.csv"
FILES = (PublicFile("test", URL, ("crows_pairs_anonymized", "crows_pairs"), (1_508,),
                    "2e71aab27deff4a4de0c7c5de7309a7649cf19904240bf249b96f576b016632e"),)
FIELDS = ("sent_more", "sent_less", "stereo_antistereo", "bias_type")


def convert(fields: dict[str, Any]) -> list[Row]:
    return [{name: text(fields, name) for name in FIELDS}]


def main(arguments: list[str]) -> None:
    options = parse_arguments(__doc__, arguments, Path(__file__).parent)
    write_splits(read_files(FILES, options.source, convert), options.out)


if __name__ == "__main__":
    run_script(main)
