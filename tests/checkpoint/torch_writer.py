"""Writes what `torch.save` would, without torch."""

import io
import pickle
import zipfile

import numpy as np


class Global:
    """Pickles as a bare reference to a global that this process need not have."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Pickler(pickle._Pickler):
    """Writes tensors as torch does, or with a size and stride of one's choice."""

    def save(self, obj, *args, **kwargs):
        if isinstance(obj, Global):
            self.write(f"c{obj.module}\n{obj.name}\n".encode())
        else:
            super().save(obj, *args, **kwargs)

    def persistent_id(self, obj):
        return obj.reference if isinstance(obj, Storage) else None


class Storage:
    def __init__(self, *reference):
        self.reference = reference


def write_archive(path, build, storages):
    """A zip checkpoint whose pickle is assembled by `build(pickler)`."""
    buffer = io.BytesIO()
    pickler = Pickler(buffer, protocol=2)
    buffer.write(pickle.PROTO + b"\x02")
    build(pickler)
    buffer.write(pickle.STOP)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", buffer.getvalue())
        for key, data in storages.items():
            archive.writestr(f"x/data/{key}", data)
    return path


def write_tensor(pickler, offset, size, stride, count=4, kind="FloatStorage", key="0"):
    """A tensor as `torch.save` pickles it, of `count` values stored under `key`."""
    pickler.save(Global("torch._utils", "_rebuild_tensor_v2"))
    pickler.write(pickle.MARK)
    pickler.save(Storage("storage", Global("torch", kind), key, "cpu", count))
    for value in (offset, size, stride, False, None):
        pickler.save(value)
    pickler.write(pickle.TUPLE + pickle.REDUCE)


def write_state_dict(path, arrays, under="model"):
    """A .pth file as facebook's: named float32 tensors under "model", or another key."""

    def build(pickler):
        pickler.write(pickle.EMPTY_DICT)
        pickler.save(under)
        pickler.write(pickle.EMPTY_DICT)
        for i, (name, array) in enumerate(arrays.items()):
            strides = tuple(stride // array.itemsize for stride in array.strides)
            pickler.save(name)
            write_tensor(pickler, 0, array.shape, strides, array.size, key=str(i))
            pickler.write(pickle.SETITEM)
        pickler.write(pickle.SETITEM)

    arrays = {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}
    storages = {str(i): array.tobytes() for i, array in enumerate(arrays.values())}
    return write_archive(path, build, storages)
