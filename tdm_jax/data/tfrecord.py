"""Random access to TFRecord files without TensorFlow.

A record is framed as: length (8 bytes, little endian), masked CRC32C of the length (4), data,
masked CRC32C of the data (4). One walk over the frames of a file gives the offsets; they are kept
beside the data, in `.tdm_jax_index/`, or in memory where the directory cannot be written. A damaged
record is left to whoever parses it: decoding a picture finds it without a second pass.
"""

import bisect
import dataclasses
import itertools
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from absl import logging
from jaxtyping import Int64, UInt8, UInt32
from tqdm import tqdm

from tdm_jax.errors import InputError

INDEX_DIRECTORY = ".tdm_jax_index"

_HEADER = 12
_FOOTER = 4
# Indexing waits for the disk, often a remote one, far more than for the processor.
_INDEXING_THREADS = 16


@dataclasses.dataclass(frozen=True)
class Shard:
    """Part of one file: `take` records after the first `skip`, of `total` that it should hold."""

    path: Path
    skip: int
    take: int
    total: int


class TFRecordReader:
    """The records of some shards, in order, as a random-access sequence of bytes."""

    def __init__(self, shards: Sequence[Shard]):
        """Finds every record's place, from the kept index or by walking the files.

        Raises:
          InputError: a file is missing, truncated, not a TFRecord file, or has another number of
            records than expected.
        """
        self._shards = tuple(shards)
        with ThreadPoolExecutor(_INDEXING_THREADS) as pool:
            offsets = pool.map(_shard_offsets, self._shards)
            bar = tqdm(offsets, "indexing", len(shards), unit=" files", delay=2.0, leave=False)
            self._offsets = [of_file[s.skip : s.skip + s.take + 1]
                             for s, of_file in zip(self._shards, bar, strict=True)]  # fmt: skip
        self._ends = list(itertools.accumulate(shard.take for shard in self._shards))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> bytes:
        """Reads one record; OSError if that fails."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard = bisect.bisect_right(self._ends, index)
        row = index - (self._ends[shard] - self._shards[shard].take)
        start, end = (int(offset) for offset in self._offsets[shard][row : row + 2])
        # Opened for each read: a thousand shards would pass the usual limit of open files, and a
        # pool of them would have to be shared between threads.
        file = os.open(self._shards[shard].path, os.O_RDONLY)
        try:
            return os.pread(file, end - start - _HEADER - _FOOTER, start + _HEADER)
        finally:
            os.close(file)


def _shard_offsets(shard: Shard) -> Int64[np.ndarray, " records_and_one"]:
    """Offsets of a file's records and, last, its size: kept ones if they fit the file."""
    try:
        size = shard.path.stat().st_size
    except OSError as error:
        raise InputError(f"cannot read {shard.path}: {error.strerror}") from None
    kept = shard.path.parent / INDEX_DIRECTORY / f"{shard.path.name}.npy"
    offsets = _read_kept(kept)
    if offsets is None or offsets[-1] != size:
        offsets = index_file(shard.path)
        _keep(kept, offsets)
    if len(offsets) - 1 != shard.total:
        raise InputError(f"{shard.path} holds {len(offsets) - 1} records, expected {shard.total}")
    return offsets


def _read_kept(path: Path) -> np.ndarray | None:
    try:
        offsets = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    valid = offsets.dtype == np.int64 and offsets.ndim == 1 and offsets.size > 0
    return offsets if valid else None


def _keep(path: Path, offsets: np.ndarray) -> None:
    """Writes to a temporary name first: readers see a whole index or none."""
    try:
        path.parent.mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            np.save(file, offsets)
        os.replace(file.name, path)
    except OSError as error:
        logging.log_first_n(
            logging.WARNING, "the index of %s stays in memory: %s", 1, path.parent.parent, error
        )


def index_file(path: Path) -> Int64[np.ndarray, " records_and_one"]:
    """Walks a file's frames: the offset of each record, and the file's size at the end.

    Raises:
      InputError: the file ends within a record, or a length does not match its checksum.
    """
    file = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(file).st_size
        offsets, headers = [], []
        for offset, header in _frames(file, size, path):
            offsets.append(offset)
            headers.append(header)
    finally:
        os.close(file)
    heads = np.frombuffer(b"".join(headers), np.uint8).reshape(-1, _HEADER)
    stored = np.ascontiguousarray(heads[:, 8:]).view("<u4")[:, 0]
    wrong = np.flatnonzero(masked_crc32c(heads[:, :8]) != stored)
    if wrong.size:
        raise _unsound(path, offsets[wrong[0]])
    return np.asarray([*offsets, size], np.int64)


def _frames(file: int, size: int, path: Path) -> Iterator[tuple[int, bytes]]:
    offset = 0
    while offset < size:
        header = os.pread(file, _HEADER, offset)
        length = int.from_bytes(header[:8], "little")
        end = offset + _HEADER + length + _FOOTER
        if len(header) < _HEADER or end > size:
            # A first length that is nonsense means another kind of file.
            if len(header) == _HEADER and not _length_is_sound(header):
                raise _unsound(path, offset)
            raise InputError(
                f"{path} is truncated: its record at byte {offset} should end at byte {end}, "
                f"the file ends at {size}"
            )
        yield offset, header
        offset = end


def _unsound(path: Path, offset: int) -> InputError:
    return InputError(
        f"{path} is no TFRecord file, or damaged at byte {offset}: "
        "a record's length does not match its checksum"
    )


def _length_is_sound(header: bytes) -> bool:
    head = np.frombuffer(header, np.uint8)
    return int(masked_crc32c(head[None, :8])[0]) == int.from_bytes(header[8:], "little")


def _crc32c_table() -> UInt32[np.ndarray, "256"]:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(0x82F63B78), table >> 1)
    return table


_TABLE = _crc32c_table()


def masked_crc32c(data: UInt8[np.ndarray, "n length"]) -> UInt32[np.ndarray, " n"]:
    """TFRecord's checksum of each row: CRC32C, rotated right by 15 bits, plus a constant."""
    crc = np.full(len(data), 0xFFFFFFFF, np.uint32)
    for column in data.T:
        crc = _TABLE[(crc ^ column) & 0xFF] ^ (crc >> 8)
    crc = ~crc
    return ((crc >> 15) | (crc << 17)) + np.uint32(0xA282EAD8)
