"""A model in a folder of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tdm_jax.checkpoint.saved_model import is_saved_model, load_model, save_model
from tdm_jax.errors import InputError


def _params(value=0.0):
    return {"params": {"w": jnp.full((8, 4), value), "b": jnp.arange(4.0)}}


def _equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


CONFIG = {"name": "vit", "image_size": [32, 64], "layer_norm_eps": 1e-12}


def test_model_round_trip(tmp_path):
    folder = tmp_path / "model"
    assert not is_saved_model(folder)
    save_model(folder, CONFIG, _params(0.3))
    assert is_saved_model(folder)
    config, params = load_model(folder)
    assert config == CONFIG
    _equal(params, _params(0.3))


def test_model_from_many_devices(tmp_path):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params = _params(0.3)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    params["params"]["w"] = jax.device_put(params["params"]["w"], rows)
    save_model(tmp_path / "model", CONFIG, params)
    _, restored = load_model(tmp_path / "model")
    _equal(restored, _params(0.3))
    assert len(restored["params"]["w"].devices()) == 1


def test_model_is_not_overwritten_unasked(tmp_path):
    folder = tmp_path / "model"
    save_model(folder, CONFIG, _params(1.0))
    with pytest.raises(InputError, match="exists"):
        save_model(folder, CONFIG, _params(2.0))
    _equal(load_model(folder)[1], _params(1.0))
    save_model(folder, CONFIG, _params(2.0), overwrite=True)
    _equal(load_model(folder)[1], _params(2.0))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "important.txt").write_text("keep")
    with pytest.raises(InputError, match="not a saved model"):
        save_model(tmp_path / "notes", CONFIG, _params(), overwrite=True)
    assert (tmp_path / "notes" / "important.txt").read_text() == "keep"


def test_failed_overwrite_keeps_the_old(tmp_path):
    folder = tmp_path / "model"
    save_model(folder, CONFIG, _params(1.0))
    with pytest.raises(TypeError):
        save_model(folder, {"dtype": jnp.float32}, _params(2.0), overwrite=True)
    _equal(load_model(folder)[1], _params(1.0))


def test_one_flipped_bit_is_damage(tmp_path):
    noise = np.random.default_rng(0).normal(size=(64, 33)).astype(np.float32)
    save_model(tmp_path / "model", CONFIG, {"params": {"w": jnp.asarray(noise)}})
    files = (tmp_path / "model" / "params").glob("**/d/*")
    file = max(files, key=lambda file: file.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match="not the bits that were saved: params/w float32"):
        load_model(tmp_path / "model")


def test_damaged_model(tmp_path):
    with pytest.raises(InputError, match="no model here"):
        load_model(tmp_path / "missing")
    save_model(tmp_path / "model", CONFIG, _params())
    for file in (tmp_path / "model" / "params").glob("**/d/*"):
        file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(InputError, match="damaged") as error:
        load_model(tmp_path / "model")
    assert "\n" not in str(error.value)
