"""E2E NLG challenge: a restaurant's attributes to a sentence about it. Fields: mr, ref.

For      table-to-text generation (Novikova et al. 2017, arXiv 1706.09254), in the form of the LoRA paper's
         Table 3: "name : Blue Spice | Type : pub" and tokenized sentences. One mr has several refs, a row
         for each
Rows     train 42,061, val 4,672, test 4,693; the texts of val and test are checked too
Licence  CC BY-SA 4.0
From     github.com/microsoft/LoRA, examples/NLG/data/e2e (.txt, a line mr||ref)

The addresses were written down without being tried.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this runs as a script, from anywhere

from data.prepare import PublicFile, Row, parse_arguments, read_files, text, write_splits  # noqa: E402
from minift.errors import run_script  # noqa: E402

URL = "https://raw.githubusercontent.com/microsoft/LoRA/main/examples/NLG/data/e2e/"
FILES = (
    PublicFile("train", URL + "train.txt", ("train",), (42_061,)),
    PublicFile("val", URL + "valid.txt", ("valid", "val"), (4_672,),
               "46a3bdd6fadc517515be3ceb0acd7447a46da5e0e4bd175277a9ba447ebbdba0"),
    PublicFile("test", URL + "test.txt", ("test",), (4_693,),
               "23cdb596ccdef2303d95ccbb55fe3ce2dfaf41af03277d3208e53f5f4a039dae"),
)


def convert(fields: dict[str, Any]) -> list[Row]:
    return [{"mr": text(fields, "mr").strip(), "ref": text(fields, "ref").strip()}]


def main(arguments: list[str]) -> None:
    options = parse_arguments(__doc__, arguments, Path(__file__).parent)
    write_splits(read_files(FILES, options.source, convert), options.out)


if __name__ == "__main__":
    run_script(main)
