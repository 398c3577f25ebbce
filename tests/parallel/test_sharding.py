from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tdm_jax.errors import InputError
from tdm_jax.parallel import sharding
from tdm_jax.parallel.sharding import MeshConfig


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1)),
        (MeshConfig(fsdp=4), (2, 4)),
        (MeshConfig(data=1, fsdp=8), (1, 8)),
    ],
)
def test_the_mesh_covers_all_devices(config, shape):
    assert tuple(sharding.make_mesh(config).shape.values()) == shape


@pytest.mark.parametrize(
    "config", [MeshConfig(data=3), MeshConfig(fsdp=3), MeshConfig(fsdp=0), MeshConfig(fsdp=16)]
)
def test_a_mesh_that_does_not_cover_them(config):
    with pytest.raises(InputError, match="does not cover 8 devices"):
        sharding.make_mesh(config)


def test_a_process_has_neighbouring_rows():
    # The order in which v5e:4x4 is walked, by the hosts of its chips.
    walk = [0, 0, 1, 1, 1, 1, 0, 2, 3, 3, 3, 3, 2, 2, 2, 0]
    devices = [SimpleNamespace(id=i, process_index=host) for i, host in enumerate(walk)]
    ordered = sharding.by_process(devices)
    assert [device.process_index for device in ordered] == sorted(walk)
    assert [device.id for device in ordered[:4]] == [0, 1, 6, 15]


def test_the_batch_must_divide():
    mesh = sharding.make_mesh(MeshConfig(fsdp=2))
    sharding.check_batch(mesh, 32, accumulate=4, name="batch_size")
    with pytest.raises(InputError, match=r"batch_size=36 .* multiple of 8"):
        sharding.check_batch(mesh, 36, name="batch_size")
    with pytest.raises(InputError, match="multiple of 32"):
        sharding.check_batch(mesh, 48, accumulate=4, name="batch_size")
    with pytest.raises(InputError, match="batch_size=0"):
        sharding.check_batch(mesh, 0, name="batch_size")


@pytest.mark.parametrize(("accumulate", "multiple"), [(1, 16), (2, 16), (3, 48), (4, 32)])
def test_mixed_pairs_stay_on_a_device(accumulate, multiple):
    mesh = sharding.make_mesh(MeshConfig(fsdp=2))
    options = {"accumulate": accumulate, "pairs": True, "name": "batch_size"}
    sharding.check_batch(mesh, multiple, **options)
    message = rf"an even number on each \(mixup .*; expected a multiple of {multiple}$"
    with pytest.raises(InputError, match=message):
        sharding.check_batch(mesh, multiple // 2, **options)


def test_a_batch_is_split_over_both_axes():
    mesh = sharding.make_mesh(MeshConfig(fsdp=2))
    image = np.arange(16 * 3).reshape(16, 3)
    placed = sharding.place_batch(mesh, {"image": image})["image"]
    np.testing.assert_array_equal(placed, image)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3)}
    assert len({shard.index[0].start for shard in placed.addressable_shards}) == 8


def test_fsdp_splits_the_largest_axis_that_divides():
    mesh = sharding.make_mesh(MeshConfig(fsdp=4))
    shapes = {
        "wide": jax.ShapeDtypeStruct((192, 768), jnp.float32),
        "tall": jax.ShapeDtypeStruct((768, 192), jnp.float32),
        "odd": jax.ShapeDtypeStruct((999, 192), jnp.float32),
        "nothing divides": jax.ShapeDtypeStruct((999, 999), jnp.float32),
        "small": jax.ShapeDtypeStruct((64,), jnp.float32),
        "scalar": jax.ShapeDtypeStruct((), jnp.int32),
    }
    specs = jax.tree.map(lambda s: s.spec, sharding.state_shardings(mesh, shapes))
    assert specs == {
        "wide": PartitionSpec(None, "fsdp"),
        "tall": PartitionSpec("fsdp"),
        "odd": PartitionSpec(None, "fsdp"),
        "nothing divides": PartitionSpec(),
        "small": PartitionSpec(),
        "scalar": PartitionSpec(),
    }


def test_data_parallelism_replicates_everything():
    mesh = sharding.make_mesh(MeshConfig())
    shapes = [jax.ShapeDtypeStruct((768, 768), jnp.float32)]
    assert sharding.state_shardings(mesh, shapes)[0].is_fully_replicated
