"""Files of named arrays that stay on the disk: each array is mapped into memory when asked for."""

import json
import mmap
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open
from safetensors import numpy as safetensors

from tdm_jax.errors import InputError, summary
from tdm_jax.files import is_remote, read_json

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


class Stored(NamedTuple):
    """Where an array lies in a file on a disk."""

    path: str
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    def map(self) -> np.ndarray:
        """The array, read-only; the disk is read where it is, and memory is given back with it."""
        size = int(np.prod(self.shape)) * self.dtype.itemsize
        if not size:
            return np.empty(self.shape, self.dtype)
        start = self.offset - self.offset % mmap.ALLOCATIONGRANULARITY
        with open(self.path, "rb") as file:
            memory = mmap.mmap(
                file.fileno(), self.offset - start + size, access=mmap.ACCESS_READ, offset=start
            )
        return np.ndarray(self.shape, self.dtype, memory, self.offset - start)


class LazyArrays(Mapping[str, np.ndarray]):
    """Arrays by name; those on a disk are mapped anew each time, so that nobody holds them all."""

    def __init__(self, places: Mapping[str, Stored | np.ndarray]):
        """Takes where each array is, or the array itself."""
        self.places = dict(places)

    def __getitem__(self, name: str) -> np.ndarray:
        """A read-only array."""
        place = self.places[name]
        return place.map() if isinstance(place, Stored) else place

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self.places)

    def __len__(self) -> int:
        """How many."""
        return len(self.places)

    def __contains__(self, name: object) -> bool:
        """Whether there is such an array; nothing is mapped."""
        return name in self.places


def read_safetensors(path: epath.Path) -> tuple[LazyArrays, dict[str, str]]:
    """The arrays of a .safetensors file and its metadata; from a store the arrays are read whole.

    Raises:
      InputError: the file is truncated or otherwise malformed.
    """
    try:
        if is_remote(path):
            content = path.read_bytes()
            size = int.from_bytes(content[:8], "little")
            metadata = json.loads(content[8 : 8 + size]).get("__metadata__", {})
            return LazyArrays(safetensors.load(content)), metadata
        with safe_open(path, "numpy"):  # checks that the entries fill the file and do not overlap
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        metadata = header.pop("__metadata__", {})
        places = {
            name: Stored(
                str(path),
                8 + size + entry["data_offsets"][0],
                _DTYPES[entry["dtype"]],
                tuple(entry["shape"]),
            )
            for name, entry in header.items()
        }
    except KeyError as error:
        raise InputError(
            f"{path}: arrays of type {error}; expected {', '.join(_DTYPES)}"
        ) from error
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: not a readable .safetensors (truncated?): {error}") from error
    return LazyArrays(places), metadata


def read_shards(
    index: epath.Path, read: Callable[[epath.Path], Mapping[str, np.ndarray]]
) -> LazyArrays:
    """The arrays of several files, as an index.json of Hugging Face beside them says.

    Args:
      index: of that file.
      read: for each of the others.

    Raises:
      InputError: the index is malformed, or a file or an array that it names is missing.
    """
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise InputError(f"{index}: expected weight_map, with a file for each array")
    shards: dict[str, LazyArrays] = {}
    for file in files.values():
        # A name alone: an index leads out of its folder nowhere.
        if not isinstance(file, str) or epath.Path(file).name != file:
            raise InputError(f"{index}: expected names of files in its folder; got {file!r}")
        if file in shards:
            continue
        if not (index.parent / file).is_file():
            raise InputError(f"{index}: {file} is missing; expected every file that it names")
        arrays = read(index.parent / file)
        shards[file] = arrays if isinstance(arrays, LazyArrays) else LazyArrays(arrays)
    missing = [name for name, file in files.items() if name not in shards[file]]
    if missing:
        raise InputError(
            f"{index}: {files[missing[0]]} has no {missing[0]}"
            + (f" (and {len(missing) - 1} more are missing)" if missing[1:] else "")
        )
    return LazyArrays({name: shards[file].places[name] for name, file in files.items()})


def read_npz(path: epath.Path) -> LazyArrays:
    """The arrays of an .npz file; those that it compresses, or a store has, are read at once.

    Raises:
      InputError: the file is truncated, or has anything but plain arrays in it.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            return LazyArrays(
                {
                    entry.filename.removesuffix(".npy"): _entry_of_npz(path, archive, entry)
                    for entry in archive.infolist()
                }
            )
    except Exception as error:  # a damaged archive fails in any way it likes
        raise InputError(f"{path}: not a readable .npz (truncated?): {summary(error)}") from error


def _entry_of_npz(
    path: epath.Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo
) -> Stored | np.ndarray:
    stored = None if is_remote(path) else stored_entry(str(path), archive, entry)
    with archive.open(entry) as file:
        if stored is not None and np.lib.format.read_magic(file) == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            if not fortran and not dtype.hasobject:
                return Stored(stored.path, stored.offset + file.tell(), _typed(dtype), shape)
        file.seek(0)
        array = np.lib.format.read_array(file, allow_pickle=False)
        return array.view(_typed(array.dtype))


def _typed(dtype: np.dtype) -> np.dtype:
    # NumPy alone knows no bfloat16: it writes two bytes of anything.
    return _DTYPES["BF16"] if dtype == np.dtype("V2") else dtype


def stored_entry(path: str, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Stored | None:
    """The bytes of an entry of a zip archive on a disk; None if they are compressed.

    Raises:
      BadZipFile: they are not those that were written.
    """
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        return None
    with archive.open(entry):  # checks the header in front of the entry
        pass
    with open(path, "rb") as file:
        file.seek(entry.header_offset + 26)
        name, extra = np.frombuffer(file.read(4), "<u2").tolist()
    # Behind 30 bytes, the name and what else stands there.
    offset = entry.header_offset + 30 + name + extra
    stored = Stored(path, offset, np.dtype(np.uint8), (entry.file_size,))
    if zlib.crc32(stored.map().data) != entry.CRC:
        raise zipfile.BadZipFile(f"bad CRC-32 of {entry.filename}")
    return stored
