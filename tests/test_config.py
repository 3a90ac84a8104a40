"""The options of a run: from the command line or config.json, with origins, bounds, and flags that modes share."""

import dataclasses
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
from scripts import MODES, train

from minift import modes
from minift.data.dataset import DataOptions
from minift.errors import UserError
from minift.modes.mode import Mode
from minift.options import flag, option
from minift.run import config
from minift.run.config import TrainOptions

OWN_PAIRS = ["--model", "./m", "--data", "x.jsonl"]


@pytest.mark.parametrize("mode", MODES)
def test_a_configuration_comes_back_with_its_origins(tmp_path: Path, mode: str) -> None:
    changes = ["--lr", "0.02", "--steps", "7", "--seed", "3"]
    [given] = config.parse(["--mode", mode, *OWN_PAIRS, *changes], "")
    config.save(tmp_path, given)
    found = config.load(tmp_path)
    assert (found.mode, found.train, found.data) == (mode, given.train, given.data)
    assert found.mode_options == given.mode_options
    assert {name: tuple(pair) for name, pair in found.origins.items()} == given.origins
    assert given.origins["lr"] == (0.02, "command line") and given.origins["clip"] == (1.0, "default")
    assert given.origins["weight_decay"] == (modes.MODES[mode].weight_decay, f"{mode}'s default")
    assert config.describe(found) == config.describe(given)
    [resumed] = config.parse(["--resume", str(tmp_path)], "")
    assert resumed.mode_options == given.mode_options
    assert resumed.train.steps == 7 and resumed.train.resume == str(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '"x"',
        '{"mode": "none"}',
        '{"mode": [], "train": {}}',
        "\x00",
        '{"mode": "lora", "train": {"later": 1}, "mode_options": {}, "data": {}, "origins": {}}',
        '{"mode": "lora", "train": {}, "mode_options": {}, "data": {}, "origins": {}}',
    ],
)
def test_a_configuration_that_cannot_be_used(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="is not a run's folder: it has no config.json"):
        config.load(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json (cannot be used|cannot be read as JSON|holds)"):
        config.load(tmp_path)


def test_a_configuration_is_json(tmp_path: Path) -> None:
    [given] = config.parse(["--mode", "lora", *OWN_PAIRS], "")
    config.save(tmp_path, given)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["train"]["model"] == "./m" and raw["mode_options"]["rank"] == modes.MODES["lora"].Options().rank


def out_of_bounds(field: dataclasses.Field) -> list[Any]:
    """A value beyond each bound that a field declares."""
    bounds = field.metadata["bounds"]
    values = [bounds[name] for name in ("above", "below") if bounds[name] is not None]  # not included
    if bounds["least"] is not None:
        values.append(bounds["least"] - 1)
    if bounds["most"] is not None:
        values.append(bounds["most"] + 1)
    return values


def bounded_options() -> list[tuple[str, str, str, Any]]:
    """(mode, section of config.json, option, value out of bounds) for every bound that there is."""
    sections = [("lora", "train", TrainOptions), ("lora", "data", DataOptions)]
    sections += [(name, "mode_options", mode.Options) for name, mode in modes.MODES.items()]
    return [(mode, section, field.name, value) for mode, section, options in sections
            for field in fields(options) for value in out_of_bounds(field)]


def test_bounds_hold_on_the_command_line_and_in_config_json(tmp_path: Path) -> None:
    """Each bound is declared once, at its option: both ways refuse a value with the same message."""
    cases = bounded_options()
    assert {"lr", "batch", "warmup_ratio", "rank", "dropout", "prompt_tokens", "bottleneck"} <= {c[2] for c in cases}
    for mode, section, name, value in cases:
        arguments = ["--mode", mode, *OWN_PAIRS]
        messages = []
        with pytest.raises(UserError) as error:
            config.parse([*arguments, f"{flag(name)}={value}"], "")
        messages.append(str(error.value))
        [given] = config.parse(arguments, "")
        config.save(tmp_path, given)
        raw = json.loads((tmp_path / "config.json").read_text())
        kind = type(raw[section][name])
        raw[section][name] = kind(value) if raw[section][name] is not None else value
        (tmp_path / "config.json").write_text(json.dumps(raw))
        with pytest.raises(UserError) as error:
            config.load(tmp_path)
        messages.append(str(error.value))
        assert messages[0].startswith(f"{flag(name)} {value}") and ": must be " in messages[0]
        shared = messages[1].removeprefix(f"{tmp_path / 'config.json'} cannot be used: ")
        assert shared.replace(".0:", ":") == messages[0].replace(".0:", ":"), messages


@dataclass(frozen=True)
class TwinOptions:
    rank: int = option(5, "the twin's own rank", least=1)
    stretch: float = option(1.0, "an option of the twin alone", above=0)


@dataclass(frozen=True)
class OddOptions:
    rank: str = option("high", "a rank of another type")


def nothing(*_: Any) -> None:
    pass


@pytest.fixture
def twin(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mode that shares --rank with lora."""
    monkeypatch.setitem(modes.MODES, "twin", Mode("twin", TwinOptions, nothing, lr=0.5, embedded_lr=0.25))


def test_two_modes_share_a_flag(twin: None) -> None:
    lora, both = config.parse(["--mode", "lora,twin", *OWN_PAIRS, "--rank", "3"], "")
    assert lora.mode_options.rank == both.mode_options.rank == 3
    lora, alone = config.parse(["--mode", "lora,twin", *OWN_PAIRS], "")
    assert (lora.mode_options.rank, alone.mode_options.rank) == (8, 5)  # each mode has its own default
    assert alone.train.lr == 0.5 and alone.origins["rank"] == (5, "default")
    [alone] = config.parse(["--mode", "twin", *OWN_PAIRS, "--rank", "2", "--stretch", "1.5"], "")
    assert alone.mode_options == TwinOptions(2, 1.5)


def test_a_shared_flag_needs_one_of_its_modes(twin: None) -> None:
    with pytest.raises(UserError, match="--rank belongs to mode lora or twin, and this run is full: leave it out"):
        config.parse(["--mode", "full", *OWN_PAIRS, "--rank", "3"], "")
    with pytest.raises(UserError, match="--stretch belongs to mode twin, and this run is lora"):
        config.parse(["--mode", "lora", *OWN_PAIRS, "--stretch", "3"], "")
    with pytest.raises(UserError, match="--rank 0: must be at least 1"):
        config.parse(["--mode", "twin", *OWN_PAIRS, "--rank", "0"], "")


def test_help_explains_a_shared_flag_once(twin: None) -> None:
    ended = train("--help")
    assert ended.code == 0 and ended.out.count("  --rank INT") == 1
    group = ended.out.partition("mode twin:")[2]
    assert "also --rank, described above" in group and "--stretch" in group


def test_a_shared_flag_of_another_type_is_an_error_of_the_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(modes.MODES, "odd", Mode("odd", OddOptions, nothing, lr=0.5, embedded_lr=0.25))
    with pytest.raises(TypeError, match="mode odd: --rank is str here and another type in an earlier group"):
        config.parse(["--mode", "lora", *OWN_PAIRS], "")
