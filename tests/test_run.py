"""A run's folder: it belongs to one process, nothing else is overwritten, and the files in it are complete."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import ROOT

from minift.errors import UserError
from minift.files.atomic import write_json
from minift.run import folder as run

CONFIG = json.dumps({"mode": "lora", "origins": {"lr": [1.0, "command line"]}})


def fill(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text, encoding="utf-8")
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*")}


@pytest.mark.parametrize(
    "prepare", [lambda folder: None, lambda folder: folder.mkdir()], ids=["new", "empty"]
)
def test_a_new_folder_is_made(tmp_path: Path, prepare: object) -> None:
    folder = tmp_path / "r"
    prepare(folder)
    with run.open_folder(folder, overwrite=False, resume=False):
        assert names(folder) == {"lock"}


def test_a_new_folder_has_its_parents_made(tmp_path: Path) -> None:
    with run.open_folder(tmp_path / "a" / "b" / "c", overwrite=False, resume=False):
        assert (tmp_path / "a" / "b" / "c").is_dir()


@pytest.mark.parametrize(
    "files", [{"config_json": CONFIG}, {"compare_json": "[]"}], ids=["a run", "a comparison"]
)
def test_a_run_is_replaced_only_when_asked(tmp_path: Path, files: dict[str, str]) -> None:
    folder = fill(tmp_path / "r", **files, tuned_safetensors="old")
    fill(folder / "lora", config_json=CONFIG)
    outside = fill(tmp_path / "outside", kept="x")
    (folder / "link").symlink_to(outside)
    before = names(folder)
    with pytest.raises(UserError, match="exists already: name another --out, or pass --overwrite"):
        with run.open_folder(folder, overwrite=False, resume=False):
            raise AssertionError
    assert names(folder) == before
    with run.open_folder(folder, overwrite=False, resume=True):
        assert names(folder) == before | {"lock"}
    with run.open_folder(folder, overwrite=True, resume=False):
        assert names(folder) == {"lock"}
    assert names(outside) == {"kept"}  # a link is taken away, what it points to is not


@pytest.mark.parametrize(
    "files",
    [
        {"thesis_txt": "years of work"},
        {"config_json": json.dumps({"model_type": "gpt2", "n_embd": 768}), "model_safetensors": "weights"},
        {"config_json": "not JSON"},
        {"config_json": "[]"},
    ],
    ids=["somebody's", "a model's", "broken", "a list"],
)
def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path, files: dict[str, str]) -> None:
    folder = fill(tmp_path / "r", **files)
    before = names(folder)
    for resume in (False, True):
        with pytest.raises(UserError, match="is not a run's folder, and is left alone"):
            with run.open_folder(folder, overwrite=True, resume=resume):
                raise AssertionError
    assert names(folder) == before


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "r").write_text("x")
    for path in (tmp_path / "r", tmp_path / "r" / "below"):
        with pytest.raises(UserError, match="cannot be written to"):
            with run.open_folder(path, overwrite=True, resume=False):
                raise AssertionError
    assert (tmp_path / "r").read_text() == "x"


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    """Another process holds it: refused before anything is deleted; free when it dies."""
    folder = fill(tmp_path / "r", config_json=CONFIG)
    hold = (
        "import sys; from pathlib import Path; from minift.run import folder as run\n"
        "with run.open_folder(Path(sys.argv[1]), False, True): print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(folder)],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert other.stdout.readline() == "held\n"
        for settings in ({"overwrite": True, "resume": False}, {"overwrite": False, "resume": True}):
            with pytest.raises(UserError, match="is in use by another run"):
                with run.open_folder(folder, **settings):
                    raise AssertionError
        assert (folder / "config.json").read_text() == CONFIG
    finally:
        other.kill()
        other.communicate()
    with run.open_folder(folder, overwrite=True, resume=False):
        assert names(folder) == {"lock"}


def test_without_out_the_first_free_number_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run.choose_folder(None, "lora") == Path("runs/lora-1")
    (tmp_path / "runs" / "lora-1").mkdir(parents=True)
    (tmp_path / "runs" / "lora-2").write_text("")
    (tmp_path / "runs" / "lora-4").mkdir()
    assert run.choose_folder(None, "lora") == Path("runs/lora-3")
    assert run.choose_folder(None, "full,lora") == Path("runs/full-lora-1")
    assert run.choose_folder("mine", "lora") == Path("mine")


def test_metrics_after_the_step_that_is_resumed_are_dropped(tmp_path: Path) -> None:
    with run.MetricsLog(tmp_path, 0) as log:
        for step in (1, 2, 3, 4):
            log.write(step=step, loss=step / 10)
            if step == 2:
                log.write(step=2, val_loss=float("inf"))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # cut short by a crash
    assert [line["step"] for line in run.read_metrics(tmp_path)] == [1, 2, 2, 3, 4]
    with run.MetricsLog(tmp_path, 2) as log:
        log.write(step=3, loss=9.0)
        assert run.read_metrics(tmp_path)[-1] == {"step": 3, "loss": 9.0}  # on the disk at once
    assert run.read_metrics(tmp_path) == [
        {"step": 1, "loss": 0.1},
        {"step": 2, "loss": 0.2},
        {"step": 2, "val_loss": float("inf")},
        {"step": 3, "loss": 9.0},
    ]
    with run.MetricsLog(tmp_path, 0):
        pass
    assert run.read_metrics(tmp_path) == []


def test_a_file_is_written_completely_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"a": [1, 2.5, None, "\u00fc"]})
    assert json.loads(path.read_text()) == {"a": [1, 2.5, None, "\u00fc"]}
    assert names(tmp_path) == {"result.json"}

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="result.json: cannot be written: No space left on device"):
        write_json(path, {})
    assert json.loads(path.read_text()) == {"a": [1, 2.5, None, "\u00fc"]}
    assert names(tmp_path) == {"result.json"}


def test_the_first_signal_is_noted_and_the_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with run.StopSignals() as stop:
        assert not stop.received
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_the_second_signal_ends_the_process() -> None:
    script = (
        "import os, signal; from minift.run import folder as run\nwith run.StopSignals():\n"
        "    for _ in range(2): os.kill(os.getpid(), signal.SIGINT)\n    print('still here')"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGINT and done.stdout == ""
