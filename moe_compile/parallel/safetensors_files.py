"""Safetensors files: what they hold, parts of them read, and written tensor by tensor.

A file is the length of a header (8 bytes), the header (JSON: dtype, shape and place of each tensor), and the tensors'
bytes, one after the other.
"""

import json
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_compile.errors import MoeCompileError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor of a file, as its header has it.  dtype: "BF16", say."""

    file: str
    dtype: str
    shape: tuple[int, ...]


class Files:
    """The tensors of a checkpoint: a file, an index, or a folder with `model.safetensors` or its index.

    Raises `MoeCompileError` if there is none, or what the index names is not there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.entries: dict[str, Entry] = {}
        self._open: dict[str, Any] = {}
        found, wanted = _files(self.path)
        for file in found:
            handle = self._handle(file)
            for name in handle.keys():  # noqa: SIM118, it is no dict
                if name in self.entries:
                    raise MoeCompileError(f"{name} is in {self.entries[name].file} and in {file}")
                entry = handle.get_slice(name)
                self.entries[name] = Entry(file, entry.get_dtype(), tuple(entry.get_shape()))
        if lost := sorted(wanted - self.entries.keys()):
            raise MoeCompileError(f"the index in {self.path} names what no file has: {some(lost)}")

    def meta(self, name: str) -> Tensor:
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise MoeCompileError(f"{name} is {entry.dtype} in {entry.file}, which no parameter here is read from")
        return torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")

    def read(self, name: str, box: tuple[slice, ...] = ()) -> Tensor:
        """A tensor, or the part of it that slices of its first dimensions cut out: no other bytes are read."""
        entry = self.entries[name]
        handle = self._handle(entry.file)
        if all(s.start == 0 and s.stop == size for s, size in zip(box, entry.shape, strict=False)):
            found = handle.get_tensor(name)
        else:
            found = handle.get_slice(name)[box]
        assert isinstance(found, Tensor)
        return found

    def _handle(self, file: str) -> Any:
        import safetensors

        if file not in self._open:
            try:
                self._open[file] = safetensors.safe_open(file, framework="pt", device="cpu")
            except (safetensors.SafetensorError, OSError) as error:
                raise MoeCompileError(f"{file} cannot be read: {error}") from None
        return self._open[file]


def _files(path: str) -> tuple[list[str], set[str]]:
    """(the files of a checkpoint, the names that its index has)."""
    if os.path.isdir(path):
        found = next((f for n in (SINGLE, INDEX) if os.path.exists(f := os.path.join(path, n))), None)
        if found is None:
            raise MoeCompileError(f"there is no {SINGLE} or {INDEX} in {path}")
        path = found
    if not os.path.exists(path):
        raise MoeCompileError(f"there is no {path}")
    if not path.endswith(".json"):
        return [path], set()
    try:
        with open(path) as file:
            index = dict(json.load(file)["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise MoeCompileError(f"{path} is no index: {type(error).__name__}: {error}") from None
    return [os.path.join(os.path.dirname(path), name) for name in sorted(set(index.values()))], set(index)


class Writer:
    """Writes a file whose tensors come one after the other, each in pieces along its first dimension."""

    def __init__(self, path: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """tensors: (name, a tensor of its dtype and shape), in the order in which they will come."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, tensor in tensors:
            start, end = end, end + tensor.nbytes
            header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._left = end
        self._file = open(path, "wb")  # noqa: SIM115, closed by `close`
        self._file.write(struct.pack("<Q", len(text)) + text)

    def write(self, piece: Tensor) -> None:
        flat = piece.detach().cpu().contiguous().reshape(-1)
        self._left -= flat.nbytes
        if flat.numel():
            self._file.write(flat.view(torch.uint8).numpy().data)

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        assert self._left == 0, f"{self._left} bytes of {self._file.name} are missing"


def some(names: Iterable[str], most: int = 5) -> str:
    """The first of a list of names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
