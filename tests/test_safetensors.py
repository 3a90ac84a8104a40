"""The safetensors reader and writer, against the safetensors package and against files made to break it."""

import json
import os
import random
import re
import tracemalloc
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from minift.errors import UserError
from minift.files import safetensors as own


def sample(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    values = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)) * 50
    values = (values > 0) if dtype == torch.bool else values.abs().to(dtype)
    scalar = torch.tensor(1).to(dtype)
    return {"matrix": values, "turned": values.T, "scalar": scalar, "empty": torch.empty(0, 4, dtype=dtype)}


def raw_file(header: bytes | dict, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and ours[name].shape == tensor.shape
        assert torch.equal(ours[name], tensor)


@pytest.mark.parametrize("name", own.DTYPES)
def test_agrees_with_the_package_both_ways(tmp_path: Path, name: str) -> None:
    tensors = sample(own.DTYPES[name])
    metadata = {"made by": "\u00fcs", "k": ""}
    own.write(tmp_path / "ours", tensors, metadata)
    assert_same(safetensors.torch.load_file(tmp_path / "ours"), tensors)
    with safetensors.safe_open(tmp_path / "ours", "pt") as file:
        assert file.metadata() == metadata

    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
    safetensors.torch.save_file(contiguous, tmp_path / "theirs", metadata=metadata)
    for path in (tmp_path / "theirs", tmp_path / "ours"):
        read, read_metadata = own.read(path)
        assert_same(read, tensors)
        assert read_metadata == metadata


def test_file_without_tensors_or_metadata(tmp_path: Path) -> None:
    own.write(tmp_path / "f", {}, {})
    assert own.read(tmp_path / "f") == ({}, {})
    assert safetensors.torch.load_file(tmp_path / "f") == {}


def test_written_order_keeps_every_tensor_aligned_and_does_not_depend_on_insertion(tmp_path: Path) -> None:
    mixed = {f"{name}{i}": torch.ones(i, dtype=dtype) for i in (3, 1) for name, dtype in own.DTYPES.items()}
    own.write(tmp_path / "a", mixed, {"k": "v"})
    own.write(tmp_path / "b", dict(reversed(mixed.items())), {"k": "v"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    content = (tmp_path / "a").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert int.from_bytes(content[:8], "little") % 8 == 0
    for name, tensor in mixed.items():
        assert header[name]["data_offsets"][0] % tensor.dtype.itemsize == 0


def test_unaligned_tensors_are_read_right_and_aligned(tmp_path: Path) -> None:
    wanted = torch.arange(6, dtype=torch.float64)
    for shift in range(1, 9):
        data = bytes(shift) + wanted.numpy().tobytes()
        header = {"pad": entry("U8", [shift], [0, shift]), "x": entry("F64", [2, 3], [shift, shift + 48])}
        (tmp_path / "f").write_bytes(raw_file(header, data))
        x = own.read(tmp_path / "f")[0]["x"]
        assert torch.equal(x, wanted.view(2, 3)) and x.data_ptr() % 8 == 0


def test_changes_in_place_stay_out_of_the_file_and_tensors_outlive_it(tmp_path: Path) -> None:
    path = tmp_path / "f"
    own.write(path, {"x": torch.arange(5.0), "y": torch.ones(2)}, {})
    before = path.read_bytes()
    x = own.read(path)[0]["x"]
    x += 1
    assert path.read_bytes() == before
    own.write(path, {"x": x}, {})  # over the very file that x is mapped from
    path.unlink()
    assert x.tolist() == [1, 2, 3, 4, 5]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists a process's mappings")
def test_reading_maps_each_tensor_until_it_is_freed(tmp_path: Path) -> None:
    path = tmp_path / "f"
    own.write(path, {f"layer{i}": torch.zeros(1 + i) for i in range(8)}, {})

    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count(str(path))

    tensors = own.read(path)[0]
    assert mappings() >= 1  # neighbouring mappings may be listed as one
    del tensors
    assert mappings() == 0


def test_empty_tensor_may_stand_after_the_one_that_begins_with_it(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(raw_file({"a": entry(), "b": entry(shape=[0], offsets=[0, 0])}, bytes(8)))
    assert_same(own.read(tmp_path / "f")[0], safetensors.torch.load_file(tmp_path / "f"))


def test_bytes_that_are_no_bool_are_true(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(raw_file({"b": entry("BOOL", [4], [0, 4])}, bytes([0, 1, 2, 255])))
    assert own.read(tmp_path / "f")[0]["b"].view(torch.uint8).tolist() == [0, 1, 1, 1]


F32 = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
HOSTILE = {
    "empty file": (b"", "0 bytes are too few"),
    "seven bytes": (b"\2\0\0\0\0\0\0", "7 bytes are too few"),
    "no header": (raw_file(b""), "header of 0 bytes"),
    "header length past the end": (raw_file(b"{}", length=3), "header of 3 bytes"),
    "header length of 2**64 - 1": (raw_file(b"{}", length=2**64 - 1), "header of 18446744073709551615 bytes"),
    "header length as signed": (raw_file(b"{}", length=2**63), "header of 9223372036854775808 bytes"),
    "not UTF-8": (raw_file(b'{"\xff":1}'), "utf-8"),
    "byte order mark": (raw_file(b"\xef\xbb\xbf{}"), "does not begin with '{'"),
    "leading space": (raw_file(b" {}"), "does not begin with '{'"),
    "list": (raw_file(b"[]"), "does not begin with '{'"),
    "not JSON": (raw_file(b"{1:2}"), "property name"),
    "two documents": (raw_file(b"{} {}"), "Extra data"),
    "zeros for padding": (raw_file(b"{}\0\0"), "Extra data"),
    "deep lists": (raw_file(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "recursion"),
    "deep objects": (raw_file(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "recursion"),
    "deep enough to parse": (raw_file(b'{"a":' + b"[" * 200 + b"]" * 200 + b"}"), "'a'"),
    "NaN": (raw_file(b'{"a":NaN}'), "NaN is not JSON"),
    "Infinity": (raw_file(b'{"a":{"dtype":"F32","shape":[-Infinity],"data_offsets":[0,0]}}'), "Infinity"),
    "number of 10,000 digits": (raw_file(b'{"a":' + b"9" * 10_000 + b"}"), "is not a size"),
    "minus zero": (raw_file(F32.replace("[0,", "[-0,").join(('{"a":', "}")).encode(), bytes(8)), "-0 is not"),
    "lone surrogate in a name": (raw_file(('{"\\ud800":' + F32 + "}").encode(), bytes(8)), "surrogates"),
    "lone surrogate in metadata": (raw_file(b'{"__metadata__":{"a":"\\udfff"}}'), "surrogates"),
    "name given twice": (raw_file(f'{{"a":{F32},"a":{F32}}}'.encode(), bytes(8)), "'a' is given twice"),
    "key given twice": (
        raw_file(b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
        "'dtype' is given twice",
    ),
    "metadata given twice": (raw_file(b'{"__metadata__":{},"__metadata__":{}}'), "given twice"),
    "metadata a list": (raw_file({"__metadata__": []}), "__metadata__ is not an object"),
    "metadata null": (raw_file({"__metadata__": None}), "__metadata__ is not an object"),
    "metadata of numbers": (raw_file({"__metadata__": {"step": 3}}), "'step' is not text"),
    "tensor a number": (raw_file({"a": 3}), "'a': not an object"),
    "tensor a list": (raw_file({"a": ["F32", [2], [0, 8]]}, bytes(8)), "'a': not an object"),
    "no shape": (raw_file({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)), "'a': not an object"),
    "key too many": (raw_file({"a": {**entry(), "strides": [1]}}, bytes(8)), "'a': not an object"),
    "unknown dtype": (raw_file({"a": entry("F8_E4M3", [8])}, bytes(8)), "'F8_E4M3' is none of F64"),
    "dtype in small letters": (raw_file({"a": entry("f32")}, bytes(8)), "'f32' is none of"),
    "dtype a list": (raw_file({"a": entry(["F32"])}, bytes(8)), "is none of"),
    "wrong dtype": (raw_file({"a": entry("F64")}, bytes(8)), "takes 16 bytes, data_offsets give 8"),
    "negative dimensions": (raw_file({"a": entry(shape=[-1, -2])}, bytes(8)), "-1 is not a size"),
    "dimension a float": (raw_file({"a": entry(shape=[2.0])}, bytes(8)), "shape [2.0] is not"),
    "dimension a bool": (raw_file({"a": entry(shape=[True, 2])}, bytes(8)), "shape [True, 2] is not"),
    "dimension text": (raw_file({"a": entry(shape=["2"])}, bytes(8)), "shape ['2'] is not"),
    "shape a number": (raw_file({"a": entry(shape=2)}, bytes(8)), "shape 2 is not"),
    "shape wraps to 2 in 64 bits": (raw_file({"a": entry(shape=[2**63 + 2])}, bytes(8)), "too large"),
    "shape wraps to 0 in 64 bits": (raw_file({"a": entry(shape=[2**32] * 2, offsets=[0, 0])}), "too large"),
    "strides overflow": (raw_file({"a": entry(shape=[0, 2**62, 2**62], offsets=[0, 0])}), "too large"),
    "huge shape": (raw_file({"a": entry(shape=[2**50])}, bytes(8)), "data_offsets give 8"),
    "a million dimensions": (raw_file({"a": entry(shape=[2**62] * 1_000_000)}, bytes(8)), "too large"),
    "shape too small": (raw_file({"a": entry(shape=[1])}, bytes(8)), "takes 4 bytes, data_offsets give 8"),
    "offsets a float": (raw_file({"a": entry(offsets=[0.0, 8.0])}, bytes(8)), "data_offsets [0.0, 8.0] are"),
    "offsets a bool": (raw_file({"a": entry(offsets=[False, 8])}, bytes(8)), "data_offsets [False, 8] are"),
    "three offsets": (raw_file({"a": entry(offsets=[0, 8, 8])}, bytes(8)), "data_offsets [0, 8, 8] are"),
    "offsets backwards": (raw_file({"a": entry(offsets=[8, 0])}, bytes(8)), "data_offsets [8, 0] are"),
    "offsets past the end": (raw_file({"a": entry(shape=[2**40], offsets=[0, 2**42])}, bytes(8)), "of 8"),
    "truncated data": (raw_file({"a": entry()}, bytes(7)), "'a': ends at byte 8 of 7"),
    "trailing bytes": (raw_file({"a": entry()}, bytes(9)), "1 bytes at the end belong to no tensor"),
    "hole at the start": (raw_file({"a": entry(offsets=[4, 12])}, bytes(12)), "'a': begins at byte 4, le"),
    "hole": (raw_file({"a": entry(), "b": entry(offsets=[9, 17])}, bytes(17)), "'b': begins at byte 9, l"),
    "overlap": (raw_file({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)), "'b': begins at byte 4,"),
    "same bytes twice": (raw_file({"a": entry(), "b": entry()}, bytes(8)), "'b': begins at byte 0, overlaps"),
    "empty tensor past the end": (raw_file({"a": entry(shape=[0], offsets=[1, 1])}), "begins at byte 1"),
    "empty tensor inside another": (
        raw_file({"a": entry(), "b": entry(shape=[0], offsets=[4, 4])}, bytes(8)),
        "'b': begins at byte 4, overlaps",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_is_refused_in_one_line_that_names_file_and_flaw(tmp_path: Path, case: str) -> None:
    content, problem = HOSTILE[case]
    (tmp_path / "hostile").write_bytes(content)
    with pytest.raises(UserError) as refusal:
        own.read(tmp_path / "hostile")
    message = str(refusal.value)
    assert problem in message and message.startswith(f"{tmp_path / 'hostile'}: ")
    assert "\n" not in message and len(message) < 500 + len(str(tmp_path))


def test_claims_of_size_cost_no_memory(tmp_path: Path) -> None:
    """What the parser may use is bounded by the file, and no tensor is made before every range is checked."""
    cases = ["huge shape", "offsets past the end", "header length as signed", "strides overflow", "overlap"]
    tracemalloc.start()
    try:
        for case in cases:
            (tmp_path / "f").write_bytes(HOSTILE[case][0])
            with pytest.raises(UserError):
                own.read(tmp_path / "f")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_no_tensor_is_made_before_the_last_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own, "map_tensor", lambda *_: pytest.fail("a tensor was made of a refused file"))
    for content, _ in HOSTILE.values():
        (tmp_path / "f").write_bytes(content)
        with pytest.raises(UserError):
            own.read(tmp_path / "f")


def test_header_above_the_limit_is_refused_unread(tmp_path: Path) -> None:
    with open(tmp_path / "f", "wb") as file:  # sparse: takes no room on disk
        file.write((own.MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}")
        file.truncate(own.MAX_HEADER_BYTES + 100)
    with pytest.raises(UserError, match="header of 100000001 bytes"):
        own.read(tmp_path / "f")


@pytest.mark.parametrize("name", ["missing", "."])
def test_path_that_is_no_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="no such file"):
        own.read(tmp_path / name)


def test_fifo_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="no such file"):
        own.read(tmp_path / "pipe")


def fuzz_corpus() -> list[bytes]:
    some = {"wte": torch.arange(6.0).view(2, 3), "b": torch.tensor([True, False, True]), "s": torch.tensor(7)}
    mixed = {"h": torch.ones(3, dtype=torch.bfloat16), "none": torch.empty(0, 3), "u": torch.ones(5).byte()}
    odd = {"u": entry("U8", [3], [0, 3]), "x": entry("F32", [2, 1], [3, 11]), "__metadata__": {"a": "b"}}
    return [
        safetensors.torch.save(some),
        safetensors.torch.save(mixed, metadata={"format": "pt", "n": "1"}),
        raw_file(odd, bytes(range(11))),
    ]


NUMBERS = b"0 1 3 8 24 -1 -0 1.0 1e1 true null NaN 4294967296 9223372036854775807 18446744073709551616 01 [0]"
PUNCTUATION = b'{}[]",:0123456789- \n\t\0\xff\xc3eE.\\'
WORDS = rb'"F64" "F16" "U8" "I8" "BOOL" "F8_E4M3" "__metadata__" "b" "u" "dtype" "shape" "\ud800" "\u0000" {}'


def mutate(content: bytes, rng: random.Random) -> bytes:
    """One or two changes; half the time the header's length is then put right, so that the parser goes on."""
    length = int.from_bytes(content[:8], "little")
    prefix, head, data = map(bytearray, (content[:8], content[8 : 8 + length], content[8 + length :]))
    for _ in range(rng.randint(1, 2)):
        part = rng.choices([prefix, head, data], [1, 12, 6])[0]
        place = rng.randrange(len(part)) if part else 0
        action = rng.choice(["number", "word", "insert", "delete", "cut"] + ["bit", "byte"] * 2)
        if action in ("number", "word"):
            places = list(re.finditer(rb"-?\d+" if action == "number" else rb'"[^"]*"', head))
            if places:
                start, end = rng.choice(places).span()
                head[start:end] = rng.choice((NUMBERS if action == "number" else WORDS).split())
        elif action == "insert":
            part[place:place] = bytes(rng.choices(PUNCTUATION, k=rng.randint(1, 3)))
        elif action == "delete":
            del part[place : place + rng.randint(1, 4)]
        elif action == "cut":
            del part[max(place, len(part) - 9) :]
        elif part:
            part[place] = part[place] ^ 1 << rng.randrange(8) if action == "bit" else rng.randrange(256)
    if rng.random() < 0.5:
        prefix = bytearray(len(head).to_bytes(8, "little"))
    return bytes(prefix + head + data)


def test_fuzz_is_never_laxer_than_the_package_and_never_crashes(tmp_path: Path) -> None:
    rng = random.Random(20240607)
    corpus = fuzz_corpus()
    path = tmp_path / "fuzz"
    accepted = 0
    for _ in range(10_000):
        content = mutate(rng.choice(corpus), rng)
        path.write_bytes(content)
        try:
            ours, _ = own.read(path)
        except UserError as refusal:
            assert "\n" not in str(refusal)
            continue
        accepted += 1
        theirs = dict(safetensors.deserialize(content))  # raises where the package refuses
        with safetensors.safe_open(path, "pt") as file:
            assert set(file.keys()) == theirs.keys()
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert list(tensor.shape) == theirs[name]["shape"]
            assert own.DTYPE_NAMES[tensor.dtype] == theirs[name]["dtype"]
            data = bytes(theirs[name]["data"])
            data = bytes(byte != 0 for byte in data) if tensor.dtype == torch.bool else data
            assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == data
    assert 500 < accepted < 9_000  # else the mutations are too harsh, or too mild, to say anything


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    (tmp_path / f".f.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match="No space left on device"):
        own.write(tmp_path / "f", {"x": torch.zeros(1 << 16)}, {})
    assert os.listdir(tmp_path) == []


def test_folder_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file or directory"):
        own.write(tmp_path / "no" / "f", {"x": torch.zeros(3)}, {})


@pytest.mark.parametrize(
    "tensors, metadata",
    [({"c": torch.zeros(2, dtype=torch.complex64)}, {}), ({"__metadata__": torch.zeros(2)}, {}),
     ({}, {"step": 3}), ({"\ud800": torch.zeros(2)}, {})],
)  # fmt: skip
def test_what_could_not_be_read_back_is_not_written(tmp_path: Path, tensors: dict, metadata: dict) -> None:
    with pytest.raises(ValueError):
        own.write(tmp_path / "f", tensors, metadata)
    assert os.listdir(tmp_path) == []


def test_writing_copies_one_tensor_at_a_time_at_most(tmp_path: Path) -> None:
    tensors = {f"layer{i}": torch.zeros(1 << 20) for i in range(4)}
    tracemalloc.start()
    try:
        own.write(tmp_path / "f", tensors, {})
        assert tracemalloc.get_traced_memory()[1] < 1 << 20  # of 16 MiB
    finally:
        tracemalloc.stop()
