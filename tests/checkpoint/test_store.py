"""What Orbax keeps of a run, and what is left of it after damage."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tdm_jax.checkpoint.store import Store
from tdm_jax.errors import InputError


def _params(value=0.0):
    return {"params": {"w": jnp.full((8, 4), value), "b": jnp.arange(4.0)}}


TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def _state(value=0.0):
    train = TrainState.create(apply_fn=None, params=_params(value), tx=TX)
    return {"train": train, "ema": _params(value + 1), "key": jax.random.key(7)}


def _equal(a, b):
    def bits(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(bits(jnp.asarray(x)), bits(jnp.asarray(y)))


@pytest.fixture
def open_store(tmp_path):
    opened = []

    def make(**options):
        opened.append(Store(tmp_path / "run", **options))
        return opened[-1]

    yield make
    for store in opened:
        store.close()


def _data_files(step: Path) -> list[Path]:
    return list((step / "state").glob("**/d/*"))


def test_empty(open_store):
    store = open_store()
    assert store.latest_step() is None
    assert store.restore(_state()) is None


def test_round_trip_is_bitwise(open_store):
    store = open_store()
    state = _state(0.1)
    assert store.save(3, state, metrics={"top1": 0.5})
    step, restored = store.restore(_state())
    assert step == 3
    assert isinstance(restored["train"], TrainState)
    _equal(restored, state)


def test_donated_state_is_saved_as_it_was(open_store):
    store = open_store()
    state = _state(0.25)
    kept = jax.tree.map(lambda x: x.copy() if hasattr(x, "copy") else x, state)
    store.save(1, state)
    jax.jit(lambda w: w * 2, donate_argnums=0)(state["ema"]["params"]["w"])
    _equal(store.restore(kept)[1], kept)


def test_keeps_last_and_best(open_store):
    store = open_store(keep_last=2, keep_best=1)
    for step, top1 in enumerate([0.1, 0.9, float("nan"), 0.3, 0.4, None], start=1):
        store.save(step, _params(), metrics=None if top1 is None else {"top1": top1, "loss": 1.0})
    store.wait()
    assert store.all_steps() == (2, 5, 6)
    store.close()
    again = open_store(keep_last=2, keep_best=1)
    again.save(7, _params(), metrics={"top1": 0.8})
    again.wait()
    assert again.all_steps() == (2, 6, 7)
    assert again.latest_step() == 7


def test_saves_a_step_once(open_store):
    store = open_store()
    assert store.save(2, _params(1.0))
    assert not store.save(2, _params(2.0))
    assert not store.save(1, _params(2.0))
    _, params = store.restore(_params())
    _equal(params, _params(1.0))


def test_restores_onto_the_shardings_asked_for(open_store):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    store = open_store()
    store.save(1, _params(1.0))  # written from one device
    abstract = {
        "params": {
            "w": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=rows),
            "b": jax.ShapeDtypeStruct((4,), jnp.float32, sharding=whole),
        }
    }
    _, params = store.restore(abstract)
    assert params["params"]["w"].sharding == rows
    assert params["params"]["b"].sharding == whole
    _equal(params, _params(1.0))
    # What comes back in another type is none the worse for it.
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), _params())
    assert store.restore(half)[1]["params"]["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "damage", ["truncated", "emptied", "zeroed", "deleted", "no metadata", "torn metrics"]
)
def test_goes_back_over_damage(damage, open_store, tmp_path, caplog):
    store = open_store()
    for step in (1, 2, 3):
        store.save(step, _state(step))
    store.close()
    for step in (2, 3):
        for file in _data_files(tmp_path / "run" / str(step)):
            if damage == "truncated":
                file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
            elif damage == "emptied":
                file.write_bytes(b"")
            elif damage == "zeroed":
                file.write_bytes(bytes(file.stat().st_size))
            elif damage == "deleted":
                file.unlink()
        if damage == "no metadata":
            shutil.rmtree(tmp_path / "run" / str(step) / "metadata")
        if damage == "torn metrics":
            (tmp_path / "run" / str(step) / "metrics" / "metrics").write_text("{")
    store = open_store()
    step, state = store.restore(_state())
    assert step == 1
    _equal(state, _state(1))
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any("step 3 is unreadable" in message for message in warnings)
    assert not [record for record in caplog.records if record.name == "asyncio"]
    # Out of the way, not gone; and the run can go on where it broke.
    assert (tmp_path / "run" / "3.unreadable.0").is_dir()
    assert store.latest_step() == 1
    assert store.save(2, _state(2))
    assert store.restore(_state())[0] == 2


def test_one_flipped_bit_is_damage(open_store, tmp_path, caplog):
    # Noise, which does not compress: nothing but the checksum knows what it was.
    noise = np.random.default_rng(0).normal(size=(64, 33)).astype(np.float32)
    store = open_store()
    for step in (1, 2):
        store.save(step, {"w": jnp.asarray(noise * step)})
    store.close()
    file = max(_data_files(tmp_path / "run" / "2"), key=lambda file: file.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    step, state = open_store().restore({"w": jnp.zeros((64, 33))})
    assert step == 1
    np.testing.assert_array_equal(state["w"], noise)
    assert "step 2 is unreadable" in caplog.text
    assert "not the bits that were saved: w float32" in caplog.text


def test_all_damaged_is_an_error(open_store, tmp_path):
    store = open_store()
    store.save(1, _params())
    store.close()
    shutil.rmtree(tmp_path / "run" / "1" / "state" / "d")
    with pytest.raises(InputError, match="no checkpoint is readable") as error:
        open_store().restore(_params())
    assert "\n" not in str(error.value)
    assert (tmp_path / "run" / "1").is_dir()


def test_half_written_step_is_not_seen(open_store, tmp_path):
    store = open_store()
    store.save(1, _params(1.0))
    store.close()
    shutil.copytree(tmp_path / "run" / "1", tmp_path / "run" / "2.orbax-checkpoint-tmp")
    reader = open_store(read_only=True)
    assert reader.all_steps() == (1,)
    assert (tmp_path / "run" / "2.orbax-checkpoint-tmp").is_dir()  # someone may be writing it
    store = open_store()
    assert store.restore(_params())[0] == 1
    assert store.save(2, _params(2.0))
    assert store.restore(_params())[0] == 2


def test_read_only_changes_nothing(open_store, tmp_path):
    with pytest.raises(InputError, match="expected a folder"):
        open_store(read_only=True)
    store = open_store()
    store.save(1, _params(1.0))
    store.save(2, _params(2.0))
    store.wait()
    shutil.rmtree(tmp_path / "run" / "2" / "state" / "d")
    reader = open_store(read_only=True)
    assert reader.restore(_params())[0] == 1
    assert reader.all_steps() == (1, 2)


def test_another_model_is_an_error(open_store):
    store = open_store()
    store.save(1, {"params": {"w": jnp.zeros((8, 4)), "old": jnp.zeros(2)}})
    with pytest.raises(InputError, match="of another model") as error:
        store.restore({"params": {"w": jnp.zeros((8, 5)), "new": jnp.zeros(2)}})
    for part in ("w: got (8, 4), expected (8, 5)", "params/new: missing", "params/old: left over"):
        assert part in str(error.value)


def test_bad_settings(open_store, tmp_path):
    with pytest.raises(InputError, match="keep_last at least 1"):
        open_store(keep_last=0)
    with pytest.raises(InputError, match="'top1' decides"):
        open_store().save(1, _params(), metrics={"loss": 1.0})
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="expected a folder"):
        Store(tmp_path / "file")
