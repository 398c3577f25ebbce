"""Reads what `torch.save` wrote, without torch and without running anything that is in the file.

A `.pth` file is a pickle, and a pickle is a program: it may name any importable function and call
it. This reader knows the few names that state dicts need, gives each an inert stand-in, and refuses
every other by name. Both containers are read: the zip archive (torch 1.6 and later) and the older
stream of pickles followed by raw storages.
"""

import io
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from os import PathLike, fspath
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from tdm_jax.checkpoint.lazy_arrays import stored_entry
from tdm_jax.errors import InputError, summary
from tdm_jax.files import is_remote

_DTYPES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

# Gives the values of one storage: (its key in the file, their type, how many) -> a flat array.
_Storage = Callable[[str, np.dtype, int], np.ndarray]


class _Malformed(Exception):
    """The file is no valid checkpoint; the message says what is wrong with it."""


class _Function:
    """A function that a pickle may call and cannot alter (the opcode BUILD sets attributes)."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: object) -> None:
        raise _Malformed("the pickle tries to change a function")


class _Dict(dict):
    """Stands for OrderedDict, whose attributes (torch's `_metadata`) nobody here needs."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        pass


class _Namespace:
    """Stands for argparse.Namespace in training checkpoints: accepts its contents, keeps none."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        pass


def _tensor(
    storage: np.ndarray,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    *_: object,  # requires_grad, backward hooks, metadata
) -> np.ndarray:
    if not isinstance(storage, np.ndarray) or storage.ndim != 1 or len(size) != len(stride):
        raise _Malformed(f"a tensor of size {size} has stride {stride}")
    if min((offset, *size, *stride)) < 0:
        raise _Malformed(f"a tensor has offset {offset}, size {size} and stride {stride}")
    # as_strided checks nothing, so an unchecked tensor could read memory that is not its own.
    end = offset + 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if 0 not in size and end > storage.size:
        raise _Malformed(f"a tensor ends at {end} in a storage of {storage.size} values")
    strides = [s * storage.itemsize for s in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False)


def _parameter(data: np.ndarray, *_: object) -> np.ndarray:
    return data


# A storage class is a plain string here: it can be neither called nor altered.
_GLOBALS: dict[str, Any] = {
    "collections.OrderedDict": _Dict,
    "argparse.Namespace": _Namespace,
    "torch.Size": tuple,
    "torch._utils._rebuild_tensor_v2": _Function(_tensor),
    "torch._utils._rebuild_parameter": _Function(_parameter),
    **{f"torch.{name}": name for name in _DTYPES},
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, storage: _Storage):
        super().__init__(file, encoding="utf-8")
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name not in _GLOBALS:
            raise _Malformed(
                f"refused: it asks for {full_name}, which is not among the names that a file of "
                f"weights needs ({', '.join(n for n in _GLOBALS if 'Storage' not in n)}, "
                "torch.*Storage)"
            )
        return _GLOBALS[full_name]

    def persistent_load(self, pid: Any) -> np.ndarray:
        match pid:
            # A sixth entry described views of storages, which ended with torch 0.4.
            case ("storage", str(kind), str(key), str(), int(count), *views) if (
                kind in _DTYPES and count >= 0 and views in ([], [None])
            ):
                return self._storage(key, _DTYPES[kind], count)
        raise _Malformed(f"unknown reference {str(pid)[:80]}")


def _native(values: np.ndarray, byteorder: str) -> np.ndarray:
    if byteorder == sys.byteorder:
        return values
    # Through integers: bfloat16 is no NumPy type of its own and knows no byte order.
    return values.view(f"u{values.itemsize}").byteswap().view(values.dtype)


def _read_zip(file: io.BufferedIOBase, path: str | None) -> Any:
    """Maps what lies at `path`, uncompressed as torch writes it, and reads anything else."""
    with zipfile.ZipFile(file) as archive:
        roots = [n.removesuffix("data.pkl") for n in archive.namelist() if n.endswith("/data.pkl")]
        if len(roots) != 1:
            raise _Malformed(f"a zip archive with {len(roots)} entries */data.pkl, expected one")
        root = roots[0]
        names = set(archive.namelist())
        byteorder = "little"  # before torch 2.1 nobody said, and it was
        if f"{root}byteorder" in names:
            byteorder = archive.read(f"{root}byteorder").decode()
        if byteorder not in ("little", "big"):
            raise _Malformed(f"byte order {byteorder[:20]!r}, expected 'little' or 'big'")
        loaded: dict[str, np.ndarray] = {}

        def storage(key: str, dtype: np.dtype, count: int) -> np.ndarray:
            if key not in loaded:
                entry = archive.getinfo(f"{root}data/{key}")
                # The declared size is checked before anything is read into memory.
                if entry.file_size != count * dtype.itemsize:
                    raise _Malformed(
                        f"storage {key} has {entry.file_size} bytes, expected "
                        f"{count * dtype.itemsize} ({count} of {dtype})"
                    )
                stored = None if path is None else stored_entry(path, archive, entry)
                values = (
                    np.frombuffer(archive.read(entry), dtype)
                    if stored is None
                    else stored._replace(dtype=dtype, shape=(count,)).map()
                )
                loaded[key] = _native(values, byteorder)
            return loaded[key]

        with archive.open(f"{root}data.pkl") as data:
            return _Unpickler(data, storage).load()


def _read_legacy(file: io.BufferedIOBase) -> Any:
    file_size = file.seek(0, 2)
    file.seek(0)
    arrays: dict[str, np.ndarray] = {}

    def storage(key: str, dtype: np.dtype, count: int) -> np.ndarray:
        if count * dtype.itemsize > file_size:
            raise _Malformed(
                f"storage {key} needs {count * dtype.itemsize} bytes, the file has {file_size}"
            )
        # The values come after the pickle; tensors are views that see them once they are read.
        return arrays.setdefault(key, np.empty(count, dtype))

    def load() -> Any:
        return _Unpickler(file, storage).load()

    if load() != _LEGACY_MAGIC or load() != _LEGACY_PROTOCOL:
        raise _Malformed("a pickle, but not one that torch.save wrote")
    _system, content = load(), load()
    for key in load():
        array = arrays[key]
        (count,) = struct.unpack("<q", file.read(8))
        if count != array.size:
            raise _Malformed(f"storage {key} has {count} values, expected {array.size}")
        got = file.readinto(array.view(np.uint8).data)
        if got != array.nbytes:
            raise _Malformed(f"storage {key} ends after {got} of {array.nbytes} bytes (truncated?)")
        array[...] = _native(array, "little")
    return content


def read_torch_file(path: str | PathLike[str]) -> Any:
    """The content of a file that `torch.save` wrote: dicts, lists, tuples, scalars and arrays.

    Every tensor is a read-only NumPy array of its own type (bfloat16 by ml_dtypes) and strides;
    tensors that share a storage share memory. An argparse.Namespace becomes an empty object.

    Raises:
      InputError: the file cannot be opened, is truncated or no PyTorch file, or its pickle asks for
        anything but tensors and plain containers; the message names what it asked for.
    """
    try:
        # From a store at once: a file there is not one of Python's own kinds.
        remote = io.BytesIO(epath.Path(path).read_bytes()) if is_remote(path) else None
        with remote or open(path, "rb") as file:
            start = file.read(4)
            file.seek(0)
            if start == b"PK\x03\x04":
                return _read_zip(file, fspath(path) if remote is None else None)
            if start[:1] != b"\x80":
                raise _Malformed(f"it starts with {start!r}, neither a zip archive nor a pickle")
            return _read_legacy(file)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except _Malformed as error:
        raise InputError(f"{path}: not a readable PyTorch checkpoint: {error}") from error
    except Exception as error:  # a damaged pickle fails in any way it likes, all of them bad input
        raise InputError(
            f"{path}: not a readable PyTorch checkpoint (truncated?): {summary(error)}"
        ) from error
