"""test_rows.jsonl: what is written is read, as arrays."""

import json

import numpy as np
import pytest

from minift.errors import UserError
from minift.report import test_rows

PAIR = {"where": "a.jsonl:3", "loss": 2.5, "targets": 4, "rouge1": 0.5, "rouge2": 0.25, "rougeL": 0.5,
        "exact_match": 0, "names": 3, "unsupported": 1, "completion": "Zo\u00eb"}
TEXT_ALONE = PAIR | {"where": "a.jsonl:4", "loss": 1.5, "targets": 6, "rouge1": None, "rouge2": None, "rougeL": None,
                     "exact_match": None, "names": 0, "unsupported": 0, "completion": ""}


def test_the_written_rows_are_read_as_arrays(tmp_path):
    base = [PAIR | {"loss": 8.0, "rougeL": 0.1}, TEXT_ALONE]
    test_rows.write(tmp_path, {"rows": [PAIR, TEXT_ALONE]}, {"rows": base})
    first = json.loads((tmp_path / "test_rows.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert first["where"] == "a.jsonl:3" and "where" not in first["tuned"]
    assert first["tuned"]["completion"] == "Zo\u00eb" and first["base"]["loss"] == 8.0
    rows = test_rows.read(tmp_path)
    assert rows.where == ["a.jsonl:3", "a.jsonl:4"]
    np.testing.assert_array_equal(rows.tuned["loss"], [2.5, 1.5])
    np.testing.assert_array_equal(rows.base["rougeL"], [0.1, np.nan])
    for measure, numerator, denominator in (("test_loss", [2.5, 1.5], [4, 6]), ("rougeL", [0.5, 0], [1, 0]),
                                            ("unsupported", [1, 0], [3, 0])):
        found = test_rows.terms(rows.tuned, measure)
        np.testing.assert_array_equal(found, [numerator, denominator])


def test_a_run_without_the_file_or_without_test_rows_has_none(tmp_path):
    assert test_rows.read(tmp_path) is None
    test_rows.write(tmp_path, {"rows": []}, {"rows": []})
    assert test_rows.read(tmp_path) is None


@pytest.mark.parametrize("text, said", [("{", ":2 cannot be read"), ("[]", ":2 cannot be read"),
                                        ('{"where": "x", "tuned": {}, "base": {}}', ":2 cannot be used"),
                                        ('{"where": "x", "tuned": 3, "base": {}}', ":2 cannot be used")])
def test_a_damaged_line_is_named(tmp_path, text, said):
    test_rows.write(tmp_path, {"rows": [PAIR]}, {"rows": [PAIR]})
    with open(tmp_path / "test_rows.jsonl", "a") as file:
        file.write(text + "\n")
    with pytest.raises(UserError, match=f"test_rows.jsonl{said}"):
        test_rows.read(tmp_path)
