"""The safetensors format: 8 bytes of header length (little-endian), a JSON header, the tensors' bytes.

Format: https://github.com/huggingface/safetensors. The reader checks every length, type and range against the
file's size before it makes a tensor. Tensors are memory-mapped: they take no memory until they are used.

The reader refuses some files that the safetensors package accepts: white space before the header, a name given twice,
keys beside dtype, shape and data_offsets, an entry that is a list, a null `__metadata__`, more than 64 dimensions, an
empty tensor whose other dimensions make 2**60 bytes, and dtypes that are not in DTYPES.
"""

import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from minift.errors import UserError
from minift.files.atomic import write_atomically

DTYPES = dict(
    F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16,
    I64=torch.int64, I32=torch.int32, I16=torch.int16, I8=torch.int8, U8=torch.uint8, BOOL=torch.bool,
)
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # the package's limit
MAX_DIMENSIONS = 64  # torch's limit


# ---- reading


class Entry(NamedTuple):
    """One tensor of the header; begin and end count bytes after the header."""

    begin: int
    end: int
    name: str
    dtype: torch.dtype
    shape: list[int]


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file by name, in the order of their bytes, and its metadata.

    Changes of a tensor never change the file. Raises UserError for a missing file or any flaw in it.
    """
    path = Path(path)
    try:
        if not path.is_file():  # open() would wait on a pipe
            raise UserError(f"{path}: no such file; give the path of a .safetensors file")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            header = read_header(file, size)
            data_begin = file.tell()
            metadata = check_metadata(header.pop("__metadata__", {}))
            entries = check_entries(header, size - data_begin)
            tensors = {entry.name: map_tensor(file, data_begin + entry.begin, entry) for entry in entries}
            return tensors, metadata
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise UserError(f"{path}: not a sound safetensors file: {error}; fetch or save it again") from None


def read_header(file: BinaryIO, size: int) -> dict[str, Any]:
    """The header's JSON object; the file's position is then the first byte after it. Raises ValueError."""
    if size < 8:
        raise ValueError(f"{size} bytes are too few, a header length alone takes 8")
    length = int.from_bytes(file.read(8), "little")
    # checked before anything is read: a damaged length may be 2**63
    if not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
        raise ValueError(f"a header of {length} bytes in a file of {size} (limit {MAX_HEADER_BYTES})")
    text = file.read(length).decode("utf-8")
    if not text.startswith("{"):
        raise ValueError("the header does not begin with '{'")
    checks = {"object_pairs_hook": make_object, "parse_int": parse_size, "parse_constant": refuse_constant}
    return json.loads(text, **checks)


def make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dictionary of unique keys; Python's parser would keep the last of two equal keys. Raises ValueError."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{show(key)} is given twice in the header")
        key.encode("utf-8")  # raises ValueError on half a surrogate pair, which JSON can spell
        found[key] = value
    return found


def parse_size(text: str) -> int:
    """Every integer in a header is a size. int() alone would accept -0, and is slow on long numbers."""
    if text.startswith("-") or len(text) > 19:
        raise ValueError(f"{text:.40} is not a size")  # 19 digits: up to 2**63
    return int(text)


def refuse_constant(text: str) -> None:
    """Raises ValueError for NaN and Infinity, which Python's parser accepts and JSON does not have."""
    raise ValueError(f"{text} is not JSON")


def show(value: Any) -> str:
    return f"{value!r:.80}"  # a hostile name may be megabytes long


def check_metadata(metadata: Any) -> dict[str, str]:
    """The same metadata if it maps strings to strings. Raises ValueError."""
    if not isinstance(metadata, dict):
        raise ValueError(f"__metadata__ is not an object: {show(metadata)}")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise ValueError(f"__metadata__ {show(key)} is not text: {show(value)}")
        value.encode("utf-8")  # raises ValueError on half a surrogate pair, as in make_object
    return metadata


def check_entries(header: dict[str, Any], data_bytes: int) -> list[Entry]:
    """The entries in the order of their bytes. Raises ValueError unless they cover each byte of the data once."""
    entries = [parse_entry(name, value) for name, value in header.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))  # the end, since an empty tensor begins where another does
    covered = 0  # bytes from the beginning that belong to a tensor
    for entry in entries:
        if entry.begin != covered:
            flaw = "overlaps the tensor before it" if entry.begin < covered else "leaves a hole before it"
            raise ValueError(f"tensor {show(entry.name)}: begins at byte {entry.begin}, {flaw}")
        if entry.end > data_bytes:
            raise ValueError(f"tensor {show(entry.name)}: ends at byte {entry.end} of {data_bytes}")
        covered = entry.end
    if covered != data_bytes:
        raise ValueError(f"{data_bytes - covered} bytes at the end belong to no tensor")
    return entries


def parse_entry(name: str, value: Any) -> Entry:
    """One entry of the header, checked by itself. Raises ValueError."""
    where = f"tensor {show(name)}:"
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where} not an object of dtype, shape and data_offsets: {show(value)}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{where} dtype {show(dtype)} is none of {' '.join(DTYPES)}")
    if not is_list_of_sizes(shape):
        raise ValueError(f"{where} shape {show(shape)} is not a list of integers")
    if not is_list_of_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{where} data_offsets {show(offsets)} are not [begin, end] with begin <= end")

    itemsize = DTYPES[dtype].itemsize
    # zeros are left out of this product, since torch computes strides of an empty tensor too, and they may overflow
    if len(shape) > MAX_DIMENSIONS or itemsize * math.prod(dim for dim in shape if dim) >= 2**60:
        raise ValueError(f"{where} shape {show(shape)} is too large")
    needed, given = itemsize * math.prod(shape), offsets[1] - offsets[0]
    if needed != given:
        size = f"shape {show(shape)} of {dtype} takes {needed} bytes"
        raise ValueError(f"{where} {size}, data_offsets give {given}")
    return Entry(offsets[0], offsets[1], name, DTYPES[dtype], shape)


def is_list_of_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)  # isinstance accepts a bool


def map_tensor(file: BinaryIO, begin: int, entry: Entry) -> Tensor:
    """One tensor of the file. Each has a mapping of its own, so that its pages are freed with the tensor."""
    count = entry.end - entry.begin
    if count == 0:
        return torch.empty(entry.shape, dtype=entry.dtype)  # an empty range cannot be mapped
    skipped = begin % mmap.ALLOCATIONGRANULARITY  # a mapping begins at a multiple of this
    # ACCESS_COPY: a changed page is copied and never written back
    mapping = mmap.mmap(file.fileno(), skipped + count, access=mmap.ACCESS_COPY, offset=begin - skipped)
    raw = torch.frombuffer(mapping, dtype=torch.uint8, count=count, offset=skipped)
    if entry.dtype is torch.bool:
        return (raw != 0).view(entry.shape)  # a byte other than 0 and 1 is undefined as a bool
    if begin % entry.dtype.itemsize:
        raw = raw.clone()  # torch expects aligned pointers
    return raw.view(entry.dtype).view(entry.shape)


# ---- writing


def write(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file atomically, one tensor in memory at a time.

    Raises UserError for an error of the disk, ValueError for a tensor or metadata that the format cannot hold.
    """
    # dtypes with large items first: so each tensor begins at a multiple of its item size
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": check_metadata(dict(metadata))} if metadata else {}
    end = 0
    for name in names:
        tensor = tensors[name]
        if name == "__metadata__" or tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"tensor {name!r} of {tensor.dtype} has no place in a safetensors file")
        begin, end = end, end + tensor.nbytes
        dtype = DTYPE_NAMES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)  # so that the data begins at a multiple of 8
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {len(text)} bytes is above the limit of {MAX_HEADER_BYTES}")

    def chunks() -> Iterator[Any]:
        yield len(text).to_bytes(8, "little") + text
        for name in names:
            flat = tensors[name].detach().cpu().contiguous().view(-1)
            yield flat.view(torch.uint8).numpy()

    write_atomically(Path(path), chunks())
