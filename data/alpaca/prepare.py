"""Stanford Alpaca: instructions and answers made with text-davinci-003. Fields: instruction, input, output.

For      instruction following (github.com/tatsu-lab/stanford_alpaca)
Rows     52,002 in one file, cut here about 80 : 10 : 10 into train, val and test by a hash of instruction and
         input, so that a prompt keeps its side and never stands on two
Licence  CC BY-NC 4.0: no commercial use
From     github.com/tatsu-lab/stanford_alpaca, alpaca_data.json

The address was written down without being tried.
"""

import hashlib
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this runs as a script, from anywhere

from data.prepare import PublicFile, Row, parse_arguments, read_files, text, write_splits  # noqa: E402
from minift.errors import run_script  # noqa: E402

URL = "https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json"
FILES = (PublicFile("all", URL, ("alpaca_data",), (52_002,)),)
SIDES = ["train"] * 8 + ["val", "test"]


def convert(fields: dict[str, Any]) -> list[Row]:
    return [{name: text(fields, name) for name in ("instruction", "input", "output")}]


def side(row: Row) -> str:
    digest = hashlib.sha256(f"{row['instruction']}\n{row['input']}".encode()).digest()
    return SIDES[int.from_bytes(digest[:8], "big") % len(SIDES)]


def main(arguments: list[str]) -> None:
    options = parse_arguments(__doc__, arguments, Path(__file__).parent)
    rows = read_files(FILES, options.source, convert)["all"]
    splits = {name: [row for row in rows if side(row) == name] for name in dict.fromkeys(SIDES)}
    write_splits(splits, options.out)


if __name__ == "__main__":
    run_script(main)
