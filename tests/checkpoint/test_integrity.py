"""Whether arrays are what they were."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tdm_jax.checkpoint.integrity import check, checksums

TYPES = ("float32", "bfloat16", "int32", "uint8", "bool")


def _array(dtype):
    noise = np.random.default_rng(0).integers(0, 100, (8, 6))
    return jnp.asarray(noise % 2 if dtype == "bool" else noise).astype(dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_checksum_does_not_hang_on_the_sharding(dtype):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    tree = {"w": _array(dtype), "key": jax.random.key(1), "step": 3}
    expected = checksums(tree)
    assert set(expected) == {f"w {dtype}", "key key<fry>", "step int32"}
    for spec in (PartitionSpec("data"), PartitionSpec()):
        placed = jax.device_put(tree["w"], NamedSharding(mesh, spec))
        assert checksums(tree | {"w": placed}) == expected


@pytest.mark.parametrize("dtype", TYPES)
def test_a_checksum_knows_values_and_places(dtype):
    array = _array(dtype)
    saved = checksums([array])
    check([array], saved)
    changed = array.at[3, 4].set(~array[3, 4] if dtype == "bool" else array[3, 4] + 1)
    for other in (changed, array[::-1], -array if dtype == "float32" else changed):
        with pytest.raises(ValueError, match=f"not the bits that were saved: 0 {dtype}"):
            check([other], saved)


def test_nothing_is_compared_across_types_or_without_checksums():
    saved = checksums({"w": _array("float32")})
    check({"w": _array("bfloat16")}, saved)
    check({"w": _array("float32") + 1}, {})
