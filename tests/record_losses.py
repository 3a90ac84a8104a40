"""The losses of 20 steps of every mode on the embedded base, to compare two versions on one machine.

    python tests/record_losses.py before.json                   run this checkout and write its losses
    python tests/record_losses.py before.json --root OTHER      the same for another checkout
    python tests/record_losses.py --compare before.json after.json   every series that differs; exit code 1 if any
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

MODES = "full,selective,lora,prompt,adapter"
RUNS = {
    "fp32": ("--mode", MODES, "--dtype", "fp32"),
    "bf16": ("--mode", MODES, "--dtype", "bf16"),
    "accumulate": ("--mode", MODES, "--dtype", "fp32", "--batch", "4", "--accumulate", "3"),
    "checkpoint": ("--mode", MODES, "--dtype", "bf16", "--checkpoint"),
    "dropout fp32": ("--mode", "lora", "--dtype", "fp32", "--dropout", "0.1", "--model-dropout", "0.1"),
    "dropout bf16": ("--mode", "lora", "--dtype", "bf16", "--dropout", "0.1", "--model-dropout", "0.1"),
    "parts": ("--mode", "lora", "--dtype", "bf16", "--targets", "q,v,proj", "--rank", "4"),
    "file order": ("--mode", "full", "--dtype", "fp32", "--order", "file", "--max-length", "120"),
}
SHORT = ("--steps", "20", "--eval-every", "10", "--val-rows", "40", "--test-rows", "8",
         "--max-new-tokens", "24")
KEPT = ("loss", "grad_norm", "val_loss")


def record(root: Path) -> dict[str, dict[str, list[float]]]:
    """{run: {mode/what: values}} of the checkout in `root`."""
    recorded = {}
    for name, arguments in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            command = [sys.executable, "train.py", *arguments, *SHORT, "--out", str(out)]
            subprocess.run(command, cwd=root, check=True, stdout=subprocess.DEVNULL,
                           env={"OMP_NUM_THREADS": "2"} | os.environ)
            recorded[name] = values = {}
            for file in sorted(out.rglob("metrics.jsonl")):
                for line in map(json.loads, file.read_text().splitlines()):
                    for key in KEPT:
                        if key in line:
                            values.setdefault(f"{file.parent.name}/{key}", []).append(line[key])
            for file in sorted(out.rglob("result.json")):
                result = json.loads(file.read_text())
                for key in ("test_loss", "rougeL", "forgetting", "base_test_loss"):
                    values[f"{file.parent.name}/{key}"] = [result[key]]
    return recorded


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1])
    parser.add_argument("--compare", action="store_true")
    args = parser.parse_args()
    if not args.compare:
        args.files[0].write_text(json.dumps(record(args.root), indent=1))
        return 0
    before, after = (json.loads(file.read_text()) for file in args.files)
    differ = 0
    for run, values in before.items():
        for key, old in values.items():
            new = after[run].get(key, [])
            worst = max((abs(a - b) for a, b in zip(old, new, strict=False)), default=0.0)
            if old != new:
                differ += 1
                print(f"{run}: {key} differs by at most {worst:.3g} ({len(old)} and {len(new)} values)")
    print(f"{sum(map(len, before.values()))} series, {differ} differ")
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main())
