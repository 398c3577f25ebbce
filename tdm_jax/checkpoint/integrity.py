"""Is what Orbax wrote all there, and is it what we expect?"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore
from etils import epath
from flax import traverse_util

from tdm_jax.errors import InputError

PyTree = Any


def verify(folder: epath.Path, branch: str = "") -> None:
    """Reads every array that Orbax wrote into a folder, one after the other; raises at damage.

    Orbax reads them all at once in an event loop, and when several fail, raises the first and
    leaves the others to print their tracebacks into whatever runs later. With a `branch` of the
    tree, its arrays alone.
    """
    for _ in _arrays(folder, branch):
        pass


def read_tree(folder: epath.Path, branch: str = "") -> dict[str, Any]:
    """What Orbax wrote, as nested dictionaries of arrays on the host; raises at damage.

    Neither shapes need be known nor the devices exist that wrote them. With a `branch`, as much of
    the tree.
    """
    flat = {tuple(name.split(".")): array for name, array in _arrays(folder, branch)}
    return traverse_util.unflatten_dict(flat)


def _arrays(folder: epath.Path, branch: str) -> Iterator[tuple[str, np.ndarray]]:
    path = str(folder)
    base = {"driver": "ocdbt", "base": f"{path if '://' in path else f'file://{path}'}/"}
    for key in tensorstore.KvStore.open(base).result().list().result():
        name, is_array, _ = key.decode().partition("/.zarray")
        if is_array and (not branch or name.split(".")[0] == branch):
            kvstore = {**base, "path": f"{name}/"}
            array = tensorstore.open({"driver": "zarr", "kvstore": kvstore}).result()
            yield name, array.read().result()


def checksums(tree: PyTree) -> dict[str, int]:
    """A number for every array, by its path and type, that changes with each bit of it.

    Every process must ask, and learns of the whole arrays, however they are split over devices.
    """
    sums = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
        sums[f"{_name(path)} {array.dtype}"] = _checksum(array)
    return {name: int(value) for name, value in jax.device_get(sums).items()}


@jax.jit
def _checksum(array: jax.Array) -> jax.Array:
    """Sum modulo 2^32, in which order does not matter, of all words mixed with their places."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    if array.dtype == bool:
        array = array.astype(jnp.uint8)
    unsigned = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
    words = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, length in enumerate(words.shape):
        place = place * length + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    # MurmurHash3's finaliser (Appleby, public domain): one to one, so no single change is lost.
    mixed = words ^ (place * jnp.uint32(0x9E3779B9))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


def check(tree: PyTree, saved: Mapping[str, int]) -> None:
    """Raises ValueError if an array is not bit for bit what it was when `saved` was computed.

    Arrays that come back as another type are not compared.
    """
    sums = checksums(tree)
    changed = sorted(name for name in sums.keys() & saved.keys() if sums[name] != saved[name])
    if changed:
        more = f" and {len(changed) - 3} more" if changed[3:] else ""
        raise ValueError(f"not the bits that were saved: {', '.join(changed[:3])}{more}")


def compare(where: str, saved: PyTree, expected: PyTree) -> None:
    """Raises InputError if a saved tree has other leaves or shapes than the expected one."""

    def shapes(tree: PyTree) -> dict[str, tuple[int, ...] | None]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {_name(path): _shape(leaf) for path, leaf in leaves}

    got, want = shapes(saved), shapes(expected)
    wrong = [
        f"{name}: got {got[name]}, expected {want[name]}"
        for name in got.keys() & want.keys()
        if None not in (got[name], want[name]) and got[name] != want[name]
    ]
    wrong += [f"{name}: missing" for name in want.keys() - got.keys()]
    wrong += [f"{name}: left over" for name in got.keys() - want.keys()]
    if wrong:
        shown = "; ".join(sorted(wrong)[:8]) + (f"; {len(wrong) - 8} more" if wrong[8:] else "")
        raise InputError(f"{where} is the checkpoint of another model or optimizer: {shown}")


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _shape(leaf: Any) -> tuple[int, ...] | None:
    # A random key is stored as its bits, with one axis more: leave its shape to Orbax.
    if not hasattr(leaf, "shape") or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return None
    return tuple(leaf.shape)
