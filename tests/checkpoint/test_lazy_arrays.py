"""Arrays that stay on the disk until asked for, in each container; and containers that are bad."""

import json
import tracemalloc
import weakref
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file

from tdm_jax.checkpoint import load_pretrained, read_state_dict, save_safetensors
from tdm_jax.checkpoint.lazy_arrays import Stored, read_npz, read_safetensors, read_shards
from tdm_jax.errors import InputError

ARRAYS = {
    "float": np.arange(6, dtype=np.float32).reshape(2, 3),
    "half": np.arange(3, dtype=np.float16),
    "odd": np.arange(3, dtype=np.int8),  # what follows is not aligned
    "bfloat": np.arange(4, dtype=np.float32).astype(ml_dtypes.bfloat16),
    "empty": np.zeros((0, 3), np.float32),
    "scalar": np.array(3.5),
    "long": np.arange(5) << 40,
    "bool": np.array([True, False]),
}


def _same(got, expected):
    assert set(got) == set(expected)
    assert len(got) == len(expected)
    for name, array in expected.items():
        assert got[name].dtype == array.dtype, name
        np.testing.assert_array_equal(got[name], array, err_msg=name)


def _one_line(error):
    assert "\n" not in str(error.value)


def test_safetensors(tmp_path):
    save_file(ARRAYS, tmp_path / "a.safetensors", {"note": "kept"})
    got, metadata = read_safetensors(epath.Path(tmp_path / "a.safetensors"))
    _same(got, ARRAYS)
    assert metadata == {"note": "kept"}
    with pytest.raises(ValueError, match="read-only"):
        got["float"][0] = 1
    with pytest.raises(KeyError):
        got["other"]


def test_a_mapping_ends_with_its_array(tmp_path):
    save_file(ARRAYS, tmp_path / "a.safetensors")
    got, _ = read_safetensors(epath.Path(tmp_path / "a.safetensors"))
    array = got["float"]
    assert not np.shares_memory(array, got["float"])
    memory = weakref.ref(array.base)
    del array
    assert memory() is None


def _rewritten(path, change):
    """A .safetensors file whose header went through `change`."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    return epath.Path(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header["float"].update(data_offsets=[8, 32]), "readable"),  # overlap
        (lambda header: header["float"].update(data_offsets=[0, 1 << 40]), "readable"),
        (lambda header: header["float"].update(shape=[2, 4]), "readable"),
        (lambda header: header["float"].update(dtype="F12"), "readable"),
        (lambda header: header["odd"].update(dtype="F8_E4M3"), "of type 'F8_E4M3'; expected F64"),
        (lambda header: header.pop("float"), "readable"),  # a hole
    ],
)
def test_bad_safetensors(change, message, tmp_path):
    save_file(ARRAYS, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=message) as error:
        read_safetensors(_rewritten(tmp_path / "a.safetensors", change))
    _one_line(error)


def _shards(folder):
    """ARRAYS in two files, and the index of both."""
    names = sorted(ARRAYS)
    parts = {"one.safetensors": names[:3], "two.safetensors": names[3:]}
    for file, part in parts.items():
        save_file({name: ARRAYS[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    return _index(folder, {"metadata": {}, "weight_map": weight_map})


def _index(folder, content):
    path = epath.Path(folder / "model.safetensors.index.json")
    path.write_text(json.dumps(content))
    return path


def test_shards(tmp_path):
    _same(read_shards(_shards(tmp_path), lambda path: read_safetensors(path)[0]), ARRAYS)
    _same(read_shards(_shards(tmp_path), load_file), ARRAYS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "expected weight_map"),
        ({"weight_map": {}}, "expected weight_map"),
        ({"weight_map": ["one.safetensors"]}, "expected weight_map"),
        ({"weight_map": {"a": "three.safetensors"}}, r"three\.safetensors is missing"),
        ({"weight_map": {"a": "one.safetensors"}}, r"one\.safetensors has no a$"),
        ({"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}, r"\(and 1 more"),
        ({"weight_map": {"a": "../one.safetensors"}}, "files in its folder; got '../one"),
        ({"weight_map": {"a": "/etc/passwd"}}, "files in its folder; got '/etc/passwd'"),
        ({"weight_map": {"a": ["x"]}}, "files in its folder; got"),
        ({"weight_map": {"a": ".."}}, r"\.\. is missing"),
    ],
)
def test_bad_index(content, message, tmp_path):
    _shards(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        read_shards(_index(tmp_path, content), lambda path: read_safetensors(path)[0])
    _one_line(error)


def test_a_truncated_shard(tmp_path):
    index = _shards(tmp_path)
    two = tmp_path / "two.safetensors"
    two.write_bytes(two.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"two\.safetensors: not a readable"):
        read_shards(index, lambda path: read_safetensors(path)[0])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(save, tmp_path):
    fortran = np.asfortranarray(ARRAYS["float"])
    save(tmp_path / "a.npz", **ARRAYS, fortran=fortran)
    path = epath.Path(tmp_path / "a.npz")
    got = read_npz(path)
    _same(got, {**ARRAYS, "fortran": fortran})
    _same(read_state_dict(path), dict(got))
    lazy = {name for name, place in got.places.items() if isinstance(place, Stored)}
    assert lazy == (set(ARRAYS) if save is np.savez else set())


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_bad_npz(save, tmp_path):
    path = epath.Path(tmp_path / "a.npz")
    save(path, **ARRAYS)
    whole = path.read_bytes()
    place = whole.rindex(ARRAYS["long"].tobytes()) if save is np.savez else len(whole) // 2
    damaged = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    for content in (b"", whole[:100], whole[:-1], damaged if save is np.savez else whole[:-50]):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"not a readable \.npz") as error:
            read_npz(path)
        _one_line(error)
    save(path, weights=np.array([{}], object))
    with pytest.raises(InputError, match=r"not a readable \.npz.*allow_pickle"):
        read_npz(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(InputError, match=r"not a readable \.npz"):
        read_npz(path)


def test_loading_holds_the_parameters_once(tiny_model, tmp_path):
    """What NumPy and Python allocate; JAX takes the arrays over. Mapped files are no one's."""
    model, variables = tiny_model(depth=6, width=512, mlp_ratio=4)
    save_safetensors(tmp_path / "a.safetensors", model, variables)
    size = sum(array.nbytes for array in jax.tree.leaves(variables))
    load_pretrained(tmp_path / "a.safetensors")  # what is traced once stays
    tracemalloc.start()
    try:
        again = load_pretrained(tmp_path / "a.safetensors")[1]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1.2 * size
    jax.tree.map(np.testing.assert_array_equal, again, variables)
