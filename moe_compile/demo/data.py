"""Byte-level text that every machine has: the source files of the Python standard library.

The same interpreter gives the same bytes, split and batches on every run, without a download.
"""

import hashlib
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

VOCAB_SIZE = 256  # one token per byte value
SKIPPED_DIRECTORIES = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "__pycache__", "idle_test", "pydoc_data"}
)
VALIDATION_EVERY = 10  # each tenth file is held out


@dataclass(frozen=True)
class Corpus:
    """Training and validation text as flat uint8 tensors, and the files they came from."""

    train: Tensor
    validation: Tensor
    train_files: tuple[str, ...]
    validation_files: tuple[str, ...]

    def batch(self, step: int, batch_size: int, length: int, seed: int = 0) -> Tensor:
        """Return int64[batch_size, length] training tokens: a pure function of (seed, step)."""
        return windows(self.train, batch_size, length, seed=1_000_003 * seed + step)

    def validation_batches(self, count: int, batch_size: int, length: int) -> list[Tensor]:
        """Return `count` fixed int64[batch_size, length] batches of held-out text."""
        return [windows(self.validation, batch_size, length, seed=i) for i in range(count)]


def windows(text: Tensor, batch_size: int, length: int, seed: int) -> Tensor:
    """Cut `batch_size` windows of `length` bytes at seeded random places of `text`."""
    if len(text) <= length:
        raise ValueError(f"text has {len(text)} bytes, a window needs more than {length}")
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(text) - length, (batch_size,), generator=generator)
    return torch.stack([text[start : start + length] for start in starts.tolist()]).long()


def load_corpus(root: Path | None = None, max_bytes: int = 3_000_000) -> Corpus:
    """Read `*.py` below `root` (default: the standard library) until `max_bytes` bytes are taken.

    Files come in the order of the hash of their relative path: a mix of packages, the same on
    every machine, whatever order the file system lists them in.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    names = sorted(_source_files(root), key=lambda name: hashlib.sha256(name.encode()).digest())
    held: tuple[list[bytes], list[bytes]] = ([], [])
    files: tuple[list[str], list[str]] = ([], [])
    taken = 0
    for index, name in enumerate(names):
        if taken >= max_bytes:
            break
        content = (root / name).read_bytes()
        part = int(index % VALIDATION_EVERY == VALIDATION_EVERY - 1)
        held[part].append(content)
        files[part].append(name)
        taken += len(content)
    return Corpus(_bytes(held[0]), _bytes(held[1]), tuple(files[0]), tuple(files[1]))


def encode(text: str) -> Tensor:
    """Return the UTF-8 bytes of `text` as int64[1, length]."""
    return torch.tensor([list(text.encode())])


def decode(tokens: Iterable[int]) -> str:
    """Return the text of byte tokens; what is not printable shows as the replacement mark."""
    text = bytes(tokens).decode(errors="replace")
    return "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text)


def _source_files(root: Path) -> list[str]:
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    return [path.as_posix() for path in paths if not SKIPPED_DIRECTORIES.intersection(path.parts)]


def _bytes(parts: list[bytes]) -> Tensor:
    content = bytearray(b"\n".join(parts))
    return torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0).byte()
