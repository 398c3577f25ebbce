"""A training's working directory as a checkpoint: finished, going on, of an older version.

What a training really writes is loaded in tests/training/test_saving.py and test_loop.py.
"""

import contextlib
import json

import jax
import numpy as np
import pytest

from tdm_jax import load_pretrained, make_reducer
from tdm_jax.checkpoint import Store, describe, integrity, save_model
from tdm_jax.errors import InputError

TDM, LEARNED = ("tdm", "dyvit")


@pytest.fixture
def write(tiny_model, tmp_path):
    def write(*steps, reducer=TDM, ema=False):
        """Makes a workdir with checkpoints of these steps; returns the variables of each."""
        model, variables = tiny_model(reducer, 0.5, layers=(1,))
        of_steps = [jax.tree.map(lambda x, s=step: x + s, variables) for step in steps]
        with contextlib.closing(Store(tmp_path / "checkpoints")) as store:
            for step, tree in zip(steps, of_steps, strict=True):
                average = jax.tree.map(lambda x: -x, tree) if ema else {}
                state = {"step": np.int32(step), "params": tree, "ema": average}
                store.save(step, {**state, "opt_state": [{"mu": tree}, np.zeros(3)]})
        (tmp_path / "model.json").write_text(json.dumps(describe(model)))
        return model, of_steps

    return write


def _equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("reducer", [TDM, LEARNED])
def test_it_gives_back_what_is_trained(reducer, write, tmp_path):
    model, (_, newest) = write(1, 2, reducer=reducer, ema=True)
    assert load_pretrained(tmp_path)[0] == model
    _equal(load_pretrained(tmp_path)[1], newest)
    assert ("reducer" in newest["params"]) == (reducer == LEARNED)
    _equal(load_pretrained(tmp_path, ema=True)[1], jax.tree.map(lambda x: -x, newest))


def test_with_another_reducer_or_none(write, tmp_path):
    write(1, reducer=LEARNED)
    plain, variables = load_pretrained(tmp_path, "none")
    assert "reducer" not in variables["params"]
    assert load_pretrained(tmp_path, "topk", layers=(2,))[0].reducer.schedule.layers == (2,)
    model, variables = load_pretrained(tmp_path, keep_rate=0.75)
    assert model.reducer == make_reducer(LEARNED, keep_rate=0.75, layers=(1,))
    assert "reducer" in variables["params"]
    assert plain == model.clone(reducer=plain.reducer)


def test_the_newest_readable_step_counts(write, tmp_path, caplog):
    _, (first, _) = write(1, 2)
    for file in (tmp_path / "checkpoints" / "2" / "state").glob("**/d/*"):
        file.write_bytes(file.read_bytes()[:40])
    _equal(load_pretrained(tmp_path)[1], first)
    assert "step 2 is unreadable" in caplog.text
    assert (tmp_path / "checkpoints" / "2").is_dir()  # whose training may be going on


def test_other_bits_than_were_saved_are_damage(write, tmp_path):
    write(1)
    file = tmp_path / "checkpoints" / "1" / "metadata" / "metadata"
    metadata = json.loads(file.read_text())
    name = next(name for name in metadata["checksums"] if name.startswith("params/"))
    metadata["checksums"][name] ^= 1
    file.write_text(json.dumps(metadata))
    with pytest.raises(InputError, match="not the bits that were saved: params/"):
        load_pretrained(tmp_path)


def test_the_optimiser_is_not_read(write, tmp_path, monkeypatch):
    write(1, ema=True)
    read = []
    arrays = integrity._arrays

    def recorded(folder, branch):
        for name, array in arrays(folder, branch):
            read.append(name)
            yield name, array

    monkeypatch.setattr(integrity, "_arrays", recorded)
    load_pretrained(tmp_path, ema=True)
    assert read
    assert all(name.startswith("ema.") for name in read)


def test_the_result_goes_before_checkpoints(write, tiny_model, tmp_path):
    write(1, ema=True)
    model, variables = tiny_model()
    save_model(tmp_path / "model", describe(model), variables)
    assert load_pretrained(tmp_path)[0] == model
    # Its average was not written yet; the last step has it.
    assert load_pretrained(tmp_path, ema=True)[0] != model


def test_refusals(write, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match="has no checkpoint yet"):
        load_pretrained(tmp_path)
    write(1)
    with pytest.raises(InputError, match="keeps no averaged weights"):
        load_pretrained(tmp_path, ema=True)
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(InputError, match="model.json: not valid JSON"):
        load_pretrained(tmp_path)
    (tmp_path / "model.json").unlink()
    with pytest.raises(InputError, match=r"no model.json, .* expected .*train continues it"):
        load_pretrained(tmp_path)
