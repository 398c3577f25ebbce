"""The reader against files that torch wrote, files cut short, and files that mean harm."""

import contextlib
import mmap
import os
import pickle
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tdm_jax.checkpoint.torch_file import read_torch_file
from tdm_jax.errors import InputError
from tests.checkpoint.torch_writer import Global, write_archive, write_tensor

GOLDENS = Path(__file__).parents[1] / "goldens"
FILES = GOLDENS / "torch_files"
EXPECTED = dict(np.load(FILES / "expected.npz"))


def _entry(content, key):
    if key in content:
        return content[key]
    outer, inner = key.split(".", 1)
    return content[outer][inner]


@pytest.mark.parametrize("name", sorted({key.split(":")[0] for key in EXPECTED}))
def test_reads_what_torch_wrote(name):
    content = read_torch_file(FILES / name)
    wanted = {key.split(":")[1]: value for key, value in EXPECTED.items() if key.startswith(name)}
    assert wanted
    for key, value in wanted.items():
        got = _entry(content, key)
        assert got.shape == value.shape, key
        np.testing.assert_array_equal(got.astype(value.dtype), value, err_msg=key)


def test_keeps_types_and_shared_storage():
    types = read_torch_file(FILES / "types.pth")
    assert types["bfloat16"].dtype == ml_dtypes.bfloat16
    for name, array in types.items():
        assert array.dtype == (np.dtype(name) if name != "bfloat16" else ml_dtypes.bfloat16)
    views = read_torch_file(FILES / "views.pth")
    assert np.shares_memory(views["base"], views["transposed"])
    assert not views["base"].flags.writeable


@pytest.mark.parametrize("name", ["training.pth", "training_legacy.pth"])
def test_training_checkpoint(name):
    content = read_torch_file(FILES / name)
    assert content["epoch"] == 3
    assert content["size"] == (2, 3)
    assert content["scaler"]["scale"] == 65536.0
    assert not hasattr(content["args"], "lr")  # the stand-in is inert
    assert content["optimizer"]["state"][0]["exp_avg"].shape == (3, 4)


@pytest.mark.parametrize(
    ("name", "asks_for"),
    [
        ("malicious.pth", "system"),
        ("malicious_legacy.pth", "system"),
        ("numpy_scalar.pth", "multiarray.scalar"),
        ("whole_module.pth", "torch.nn.modules.linear.Linear"),
    ],
)
def test_refuses_by_name(name, asks_for, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=asks_for) as error:
        read_torch_file(FILES / name)
    assert "\n" not in str(error.value)
    assert not os.listdir(tmp_path)  # the command in the malicious files did not run


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth", "training.pth", "training_legacy.pth"])
def test_every_truncation_is_one_line(name, tmp_path):
    whole = (FILES / name).read_bytes()
    cut = tmp_path / "cut.pth"
    for size in {*range(0, len(whole), 37), len(whole) - 1}:
        cut.write_bytes(whole[:size])
        with pytest.raises(InputError) as error:
            read_torch_file(cut)
        assert "\n" not in str(error.value)
        assert str(cut) in str(error.value)


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth"])
def test_damage_raises_nothing_else(name, tmp_path):
    whole = (FILES / name).read_bytes()
    damaged = tmp_path / "damaged.pth"
    rng = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(whole)
        data[rng.integers(len(data))] = rng.integers(256)
        damaged.write_bytes(data)
        with contextlib.suppress(InputError):  # an altered value may go unnoticed; nothing else may
            read_torch_file(damaged)


def test_storages_are_mapped(tmp_path):
    """What lies uncompressed on a disk is not read at once, and what a disk spoilt is found."""
    for array in read_torch_file(FILES / "views.pth").values():
        while hasattr(array, "base"):
            array = array.base
        assert isinstance(array, mmap.mmap)
    whole = bytearray(_four(tmp_path).read_bytes())
    whole[whole.index(FOUR)] ^= 1
    (tmp_path / "a.pth").write_bytes(whole)
    with pytest.raises(InputError, match=r"bad CRC-32 of x/data/0"):
        read_torch_file(tmp_path / "a.pth")


def test_big_endianwrite_archive(tmp_path):
    content = read_torch_file(FILES / "types.pth")
    swapped = tmp_path / "big.pth"
    # torch numbers the storages in the order of the tensors.
    sizes = {str(i): array.itemsize for i, array in enumerate(content.values())}
    with zipfile.ZipFile(FILES / "types.pth") as source, zipfile.ZipFile(swapped, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("/byteorder"):
                data = b"big"
            elif "/data/" in name and name.rsplit("/", 1)[1] in sizes:
                item = sizes[name.rsplit("/", 1)[1]]
                data = np.frombuffer(data, f"u{item}").byteswap().tobytes()
            target.writestr(name, data)
    for key, value in read_torch_file(swapped).items():
        np.testing.assert_array_equal(value, content[key], err_msg=key)


FOUR = np.arange(4, dtype=np.float32).tobytes()


def _four(folder):
    """An archive with one tensor, the last three of four numbers."""
    return write_archive(folder / "a.pth", lambda p: write_tensor(p, 1, (3,), (1,)), {"0": FOUR})


def test_handmade_archive_is_readable(tmp_path):
    path = _four(tmp_path)
    np.testing.assert_array_equal(read_torch_file(path), [1, 2, 3])


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [(0, (5,), (1,)), (2, (3,), (1,)), (0, (2, 2), (1, 3)), (0, (2,), (-1,)), (-1, (2,), (1,)),
     (0, (2,), (1, 1)), (0, (-1,), (1,)), (1 << 70, (2,), (1,))],
)  # fmt: skip
def test_tensor_outside_its_storage(offset, size, stride, tmp_path):
    path = write_archive(
        tmp_path / "a.pth", lambda p: write_tensor(p, offset, size, stride), {"0": FOUR}
    )
    with pytest.raises(InputError, match=r"tensor|OverflowError"):
        read_torch_file(path)


@pytest.mark.parametrize("count", [3, 5, 1 << 60])
def test_storage_of_another_size(count, tmp_path):
    path = write_archive(
        tmp_path / "a.pth", lambda p: write_tensor(p, 0, (2,), (1,), count), {"0": FOUR}
    )
    with pytest.raises(InputError, match=f"storage 0 has 16 bytes, expected {count * 4}"):
        read_torch_file(path)


def test_a_function_cannot_be_changed(tmp_path):
    def build(pickler):
        pickler.save(Global("torch._utils", "_rebuild_tensor_v2"))
        pickler.save((None, {"_function": 1}))
        pickler.write(pickle.BUILD)

    with pytest.raises(InputError, match="tries to change a function"):
        read_torch_file(write_archive(tmp_path / "a.pth", build, {}))


@pytest.mark.parametrize("name", ["OrderedDict", "Namespace"])
def test_a_class_cannot_be_changed(name, tmp_path):
    module = {"OrderedDict": "collections", "Namespace": "argparse"}[name]

    def build(pickler):
        pickler.save(Global(module, name))
        pickler.save((None, {"__getitem__": 1}))
        pickler.write(pickle.BUILD)

    with pytest.raises(InputError, match="TypeError"):
        read_torch_file(write_archive(tmp_path / "a.pth", build, {}))


def test_other_files(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_torch_file(tmp_path / "missing.pth")
    text = tmp_path / "page.pth"
    text.write_text("<html>not found</html>")
    with pytest.raises(InputError, match="neither a zip archive"):
        read_torch_file(text)
    with pytest.raises(InputError, match="not one that torch"):
        read_torch_file(FILES / "plain_pickle.pth")
    with zipfile.ZipFile(tmp_path / "other.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(InputError, match="0 entries"):
        read_torch_file(tmp_path / "other.pth")


def test_legacy_count_disagrees(tmp_path):
    whole = bytearray((FILES / "types_legacy.pth").read_bytes())
    start = whole.rindex(struct.pack("<q", 6))
    whole[start : start + 8] = struct.pack("<q", 7)
    (tmp_path / "a.pth").write_bytes(whole)
    with pytest.raises(InputError, match="has 7 values, expected 6"):
        read_torch_file(tmp_path / "a.pth")


def test_facebook_file():
    weights = np.load(GOLDENS / "vit_weights.npz")
    content = read_torch_file(GOLDENS / "facebook_deit.pth")["model"]
    assert list(content) == weights.files
    for name in weights.files:
        np.testing.assert_array_equal(content[name], weights[name], err_msg=name)
