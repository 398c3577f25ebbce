"""Is what Orbax wrote all there, and is it what we expect?"""

from typing import Any

import jax
import jax.numpy as jnp
import tensorstore
from etils import epath

from tdm_jax.errors import InputError

PyTree = Any


def verify(folder: epath.Path) -> None:
    """Reads every array that Orbax wrote into a folder, one after the other; raises at damage.

    Orbax reads them all at once in an event loop, and when several fail, raises the first and
    leaves the others to print their tracebacks into whatever runs later.
    """
    path = str(folder)
    base = {"driver": "ocdbt", "base": f"{path if '://' in path else f'file://{path}'}/"}
    for key in tensorstore.KvStore.open(base).result().list().result():
        name = key.decode()
        if name.endswith("/.zarray"):
            kvstore = {**base, "path": name.removesuffix(".zarray")}
            array = tensorstore.open({"driver": "zarr", "kvstore": kvstore}).result()
            array.read().result()


def compare(where: str, saved: PyTree, expected: PyTree) -> None:
    """Raises InputError if a saved tree has other leaves or shapes than the expected one."""

    def shapes(tree: PyTree) -> dict[str, tuple[int, ...] | None]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(p, simple=True, separator="/"): _shape(x) for p, x in leaves}

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


def _shape(leaf: Any) -> tuple[int, ...] | None:
    # A random key is stored as its bits, with one axis more: leave its shape to Orbax.
    if not hasattr(leaf, "shape") or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return None
    return tuple(leaf.shape)
