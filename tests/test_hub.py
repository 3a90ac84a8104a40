"""Models by name: folders, and repositories of a server on this machine that answers as the Hub does."""

import contextlib
import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from minift.errors import UserError
from minift.files import weights

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "name, message",
    [
        ("gtp2", "--model gtp2: not a model of the Hub that is known here: gpt2, gpt2-medium"),
        ("mine", "(a folder of that name is here: write ./mine)"),
        ("./gpt2", "--model ./gpt2: there is no such folder; it must hold config.json, the weights"),
        ("some/gpt2", "--model some/gpt2: there is no such folder, and it could not be fetched from the Hub"),
        ("~/no such folder", "there is no such folder"),
        ("", "not a model of the Hub"),
        ("mine/config.json", "there is no such folder"),
    ],
)
def test_names_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    with pytest.raises(UserError) as caught:
        weights.load(name)
    assert message in str(caught.value)


def test_a_path_is_a_folder_even_if_the_hub_has_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder, tmp_path / "gpt2")
    assert weights.load("./gpt2").folder.resolve() == tmp_path / "gpt2"
    assert weights.load(str(tmp_path / "gpt2")).fingerprint == weights.load("./gpt2").fingerprint


LOAD = """import sys
from minift.files import weights
base = weights.load(sys.argv[1])
print(base.folder, base.fingerprint)
"""


def load_elsewhere(name: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: huggingface_hub reads its environment when it is imported."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    kept |= {"HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"} | environment
    return subprocess.run(
        [sys.executable, "-c", LOAD, name], cwd=ROOT, env=kept, capture_output=True, text=True, timeout=120
    )


@contextlib.contextmanager
def fake_hub(repository: str, folder: Path, revision: str = "main") -> Iterator[tuple[str, list[str]]]:
    """A server with the few answers that a download takes; gives its address and the requested paths."""
    asked: list[str] = []
    commit = "0123456789abcdef0123456789abcdef01234567"
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    listing = [
        {"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in files.items()
    ]
    about = {"id": repository, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
    answers = {
        f"/api/models/{repository}/revision/{revision}": json.dumps(about).encode(),
        f"/api/models/{repository}/tree/{commit}": json.dumps(listing).encode(),
    }
    answers |= {f"/{repository}/resolve/{commit}/{name}": data for name, data in files.items()}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = urllib.parse.unquote(self.path.partition("?")[0])
            body = answers.get(path)
            asked.append(path)
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", str(len(body or b"")))
            self.send_header("Content-Type", "application/json")
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{path.rpartition("/")[2]}"')
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body or b"")

        do_HEAD = do_GET

        def log_message(self, *arguments: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_name_comes_from_the_hub_and_then_from_the_cache(tmp_path: Path, model_folder: Path) -> None:
    source = shutil.copytree(model_folder, tmp_path / "source")
    (source / "flax_model.msgpack").write_bytes(b"not wanted")
    with fake_hub("distilbert/distilgpt2", source) as (address, asked):
        done = load_elsewhere("distilgpt2", tmp_path / "home", HF_ENDPOINT=address)
    assert done.returncode == 0, done.stderr
    fingerprint = weights.load(str(model_folder)).fingerprint
    assert done.stdout.split()[-1] == fingerprint and str(tmp_path / "home") in done.stdout
    fetched = {path.rpartition("/")[2] for path in asked if "/resolve/" in path}
    assert fetched == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "vocab.json",
        "merges.txt",
    }
    offline = load_elsewhere("distilgpt2", tmp_path / "home", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0 and offline.stdout == done.stdout


@pytest.mark.parametrize(
    "environment",
    [
        {"HF_HUB_OFFLINE": "1"},
        {"HF_ENDPOINT": "http://127.0.0.1:9"},
    ],
    ids=["offline", "nobody answers"],
)
def test_without_a_network_the_message_says_what_to_do(tmp_path: Path, environment: dict[str, str]) -> None:
    done = load_elsewhere("gpt2", tmp_path / "home", **environment)
    line = done.stderr.splitlines()[-1]
    assert "UserError: --model gpt2 could not be fetched from the Hub (" in line
    files = "config.json, model.safetensors, vocab.json and merges.txt"
    assert line.endswith(
        f"without a network, put {files} of huggingface.co/openai-community/gpt2 into a folder "
        "and pass its path, such as --model ./gpt2"
    )


def test_without_huggingface_hub_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # Python then fails to import it
    with pytest.raises(UserError, match="needs the package huggingface_hub.*or put config.json"):
        weights.load("gpt2-xl")


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """online(address): this process fetches names of the Hub from there; online(""): it has no network."""

    def use(address: str) -> None:
        cache = str(tmp_path / "cache")
        settings = {"endpoint": address} if address else {"local_files_only": True}
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", not address)
        download = functools.partial(huggingface_hub.snapshot_download, cache_dir=cache, **settings)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)

    return use


def fetched(asked: list[str]) -> set[str]:
    return {path.rpartition("/")[2] for path in asked if "/resolve/" in path}


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "refs/pr/3"])
def test_any_gpt2_of_the_hub_by_owner_and_name(
    online: Callable, model_folder: Path, revision: str | None
) -> None:
    name = "some-owner/gpt2-portuguese.small" + (f"@{revision}" if revision else "")
    with fake_hub("some-owner/gpt2-portuguese.small", model_folder, revision or "main") as (address, asked):
        online(address)
        base = weights.load(name)
    assert base.fingerprint == weights.load(str(model_folder)).fingerprint and base.name == name
    assert fetched(asked) >= {"config.json", "model.safetensors", "vocab.json", "merges.txt"}
    online("")
    assert weights.load(name).folder == base.folder


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_in_bin_files_are_fetched_where_there_are_no_others(
    online: Callable, tmp_path: Path, model_folder: Path, sharded: bool
) -> None:
    source = shutil.copytree(model_folder, tmp_path / "source")
    state = weights.safetensors.read(source / "model.safetensors")[0]
    (source / "model.safetensors").unlink()
    (source / "rust_model.ot").write_bytes(b"not wanted")
    if sharded:
        names = sorted(state)
        parts = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
        for file, some in parts.items():
            torch.save({name: state[name].clone() for name in some}, source / file)
        index = {name: file for file, some in parts.items() for name in some}
        (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    else:
        torch.save({name: tensor.clone() for name, tensor in state.items()}, source / "pytorch_model.bin")
    with fake_hub("a/b", source) as (address, asked):
        online(address)
        base = weights.load("a/b")
    assert base.fingerprint == weights.load(str(model_folder)).fingerprint
    assert "rust_model.ot" not in fetched(asked)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"model_type": "llama"}, "model_type is 'llama', and only 'gpt2' can be loaded"),
        ({"model_type": "gpt2", "attention_head_type": "multiquery"}, "attention_head_type is 'multiquery'"),
        (None, "has no config.json"),
    ],
)
def test_what_is_no_gpt2_is_refused_before_its_weights_are_fetched(
    online: Callable, tmp_path: Path, model_folder: Path, config: dict[str, Any] | None, message: str
) -> None:
    source = shutil.copytree(model_folder, tmp_path / "source")
    (source / "config.json").unlink()
    if config is not None:
        (source / "config.json").write_text(json.dumps(config))
    with fake_hub("meta/llama", source) as (address, asked):
        online(address)
        with pytest.raises(UserError) as caught:
            weights.load("meta/llama")
    assert message in str(caught.value) and fetched(asked) <= {"config.json"}


@pytest.mark.parametrize("name", ["a/c", "a/b@v2"])
def test_a_repository_that_the_hub_does_not_have(online: Callable, model_folder: Path, name: str) -> None:
    with fake_hub("a/b", model_folder) as (address, _):
        online(address)
        with pytest.raises(UserError) as caught:
            weights.load(name)
    assert f"--model {name}: there is no such folder, and it could not be fetched" in str(caught.value)


def test_a_folder_comes_before_a_repository_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder, tmp_path / "owner" / "name")
    assert weights.load("owner/name").folder == Path("owner/name")


def test_a_presets_shape_needs_no_network() -> None:
    base = weights.load_on_meta("gpt2-xl")
    assert sum(p.numel() for p in base.model.parameters()) == 1_557_611_200
    assert base.folder is None and base.fingerprint is None and base.eos_token_id == 50256
    with pytest.raises(UserError, match="gpt3-175b: not a model of the Hub"):
        weights.load("gpt3-175b")
