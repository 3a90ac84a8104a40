"""The safetensors format by hand: 8 bytes of header length (little-endian), a JSON header, the tensors.

Format: https://github.com/huggingface/safetensors. The reader takes nothing on trust: every length, type and
range is checked against the file's size before a tensor is made. The tensors are memory-mapped, each on its
own: they cost neither time nor memory until they are used.

Stricter than the safetensors package, which accepts these: white space before the header, a name given twice,
keys beside dtype, shape and data_offsets, an entry that is a list, a null `__metadata__`, an empty tensor
whose other dimensions make 2**60 bytes, and the dtypes that are not in DTYPES.
"""

import contextlib
import json
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from minift.errors import UserError

DTYPES = dict(
    F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16,
    I64=torch.int64, I32=torch.int32, I16=torch.int16, I8=torch.int8, U8=torch.uint8, BOOL=torch.bool,
)
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # the package's limit


class _Entry(NamedTuple):
    begin: int  # bytes after the header
    end: int
    name: str
    dtype: torch.dtype
    shape: list[int]


def read(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a file by name, in the order of their bytes, and its `__metadata__`.

    A change in place never reaches the file. Only BOOL and unaligned tensors are copied. UserError: no such
    file, or any flaw in it.
    """
    path = Path(path)
    try:
        if not path.is_file():  # open() would wait on a pipe
            raise UserError(f"{path}: no such file; give the path of a .safetensors file")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            header = _read_header(file, size)
            data_begin = file.tell()
            metadata = _check_metadata(header.pop("__metadata__", {}))
            entries = _check_layout(header, size - data_begin)
            return {entry.name: _tensor(file, data_begin + entry.begin, entry) for entry in entries}, metadata
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise UserError(f"{path}: not a sound safetensors file: {error}; fetch or save it again") from None


def _read_header(file: BinaryIO, size: int) -> dict[str, Any]:
    """The header's JSON object; leaves the file at the first byte after it. ValueError: what is wrong."""
    if size < 8:
        raise ValueError(f"{size} bytes are too few, a header length alone takes 8")
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
        raise ValueError(f"a header of {length} bytes in a file of {size} (limit {MAX_HEADER_BYTES})")
    text = file.read(length).decode("utf-8")
    if not text.startswith("{"):
        raise ValueError("the header does not begin with '{'")
    return json.loads(text, object_pairs_hook=_no_duplicates, parse_int=_size, parse_constant=_no_constant)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{_show(key)} is given twice in the header")
        key.encode("utf-8")  # a lone surrogate, which JSON can spell and UTF-8 cannot, raises ValueError
        found[key] = value
    return found


def _size(text: str) -> int:
    """Every number of the format is a size. Checked as text: int() is slow on long ones and takes -0."""
    if text.startswith("-") or len(text) > 19:
        raise ValueError(f"{text:.40} is not a size")
    return int(text)


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _show(value: Any) -> str:
    return f"{value!r:.80}"  # a hostile name may be megabytes long


def _check_metadata(metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict):
        raise ValueError(f"__metadata__ is not an object: {_show(metadata)}")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise ValueError(f"__metadata__ {_show(key)} is not text: {_show(value)}")
        value.encode("utf-8")
    return metadata


def _check_layout(header: dict[str, Any], buffer_bytes: int) -> list[_Entry]:
    """The entries sorted by place, which together cover the buffer once. ValueError: what is wrong."""
    entries = []
    for name, value in header.items():
        try:
            entries.append(_check_entry(name, value))
        except ValueError as error:
            raise ValueError(f"tensor {_show(name)}: {error}") from None
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    covered = 0
    for entry in entries:
        if entry.begin != covered:
            problem = "overlaps the tensor before" if entry.begin < covered else "leaves a hole before itself"
            raise ValueError(f"tensor {_show(entry.name)}: begins at byte {entry.begin}, {problem}")
        if entry.end > buffer_bytes:
            raise ValueError(f"tensor {_show(entry.name)}: ends at byte {entry.end} of {buffer_bytes}")
        covered = entry.end
    if covered != buffer_bytes:
        raise ValueError(f"{buffer_bytes - covered} bytes at the end belong to no tensor")
    return entries


def _check_entry(name: str, value: Any) -> _Entry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"not an object of dtype, shape and data_offsets: {_show(value)}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"dtype {_show(dtype)} is none of {' '.join(DTYPES)}")
    if not _are_sizes(shape):
        raise ValueError(f"shape {_show(shape)} is not a list of whole numbers")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"data_offsets {_show(offsets)} are not [begin, end] with begin <= end")
    extent = DTYPES[dtype].itemsize
    for dim in shape:
        extent *= max(dim, 1)  # zeros left out: the other dimensions alone must not overflow torch's strides
        if extent >= 2**60:
            raise ValueError(f"shape {_show(shape)} is too large for any file")
    nbytes = 0 if 0 in shape else extent
    if nbytes != offsets[1] - offsets[0]:
        taken = offsets[1] - offsets[0]
        raise ValueError(f"shape {_show(shape)} of {dtype} takes {nbytes} bytes, data_offsets give {taken}")
    return _Entry(*offsets, name, DTYPES[dtype], shape)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)  # isinstance takes a bool


def _tensor(file: BinaryIO, begin: int, entry: _Entry) -> torch.Tensor:
    """Mapped on its own, so that its pages leave memory with the tensor and not with the last of the file."""
    if entry.begin == entry.end:
        return torch.empty(entry.shape, dtype=entry.dtype)  # an empty range cannot be mapped
    skipped = begin % mmap.ALLOCATIONGRANULARITY  # where a mapping may begin
    count = entry.end - entry.begin
    mapping = mmap.mmap(file.fileno(), skipped + count, access=mmap.ACCESS_COPY, offset=begin - skipped)
    raw = torch.frombuffer(mapping, dtype=torch.uint8, count=count, offset=skipped)
    if entry.dtype is torch.bool:
        return (raw != 0).view(entry.shape)  # a byte other than 0 and 1 is undefined as a bool
    if begin % entry.dtype.itemsize:
        raw = raw.clone()  # torch takes its pointers to be aligned
    return raw.view(entry.dtype).view(entry.shape)


def write(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write the file whole or not at all: a failure, or a crash, at any moment leaves the previous one.

    Order: by itemsize, largest first, which keeps every tensor aligned, then by name. One tensor at a time is
    copied, and only where it is not already contiguous in CPU memory. UserError: the disk refuses.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": _check_metadata(dict(metadata))} if metadata else {}
    end = 0
    for name in order:
        tensor = tensors[name]
        if name == "__metadata__" or tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"tensor {name!r} of {tensor.dtype} has no place in a safetensors file")
        begin, end = end, end + tensor.numel() * tensor.dtype.itemsize
        dtype = DTYPE_NAMES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {len(text)} bytes is above the limit of {MAX_HEADER_BYTES}")

    def chunks() -> Iterator[Any]:
        yield len(text).to_bytes(8, "little") + text
        for name in order:
            flat = tensors[name].detach().cpu().contiguous().view(-1)
            yield flat.view(torch.uint8).numpy()

    write_file(path, chunks())


def write_file(path: str | Path, chunks: Iterable[Any]) -> None:
    """Replace a file by these bytes-like chunks, whole or not at all. UserError: the disk refuses."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # same folder, so same file system
    try:
        with open(temporary, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())  # else a power cut could leave the new name without its bytes
        os.replace(temporary, path)
    except OSError as error:
        reason = f"{error.strerror or error}; a previous file is untouched"
        raise UserError(f"{path}: cannot be written: {reason}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError, AttributeError):  # not every system syncs folders; either file is whole
        descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
