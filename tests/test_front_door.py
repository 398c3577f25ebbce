"""The few lines of the README that everybody starts from, word for word, with small models."""

import contextlib
import json

import jax
import numpy as np
import pytest
from PIL import Image

from tdm_jax.checkpoint import Store, describe, to_state_dict
from tests.checkpoint.torch_writer import write_state_dict


@pytest.fixture
def folder(tiny_model, tmp_path, monkeypatch):
    """With a training's folder and a file of facebook's, as the snippet names them."""
    monkeypatch.chdir(tmp_path)
    model, variables = tiny_model("evit", 0.5, layers=(1,))
    with contextlib.closing(Store("runs/digits/checkpoints")) as store:
        store.save(2, {"step": np.int32(2), "params": variables, "ema": {}, "opt_state": {}})
    (tmp_path / "runs" / "digits" / "model.json").write_text(json.dumps(describe(model)))
    model, variables = tiny_model(depth=12, width=64, num_heads=1, image_size=32)
    write_state_dict(tmp_path / "deit_small.pth", to_state_dict(model, variables))
    return tmp_path


@pytest.mark.slow  # outside jit each operation is compiled for itself
def test_snippet(folder):
    images = [Image.new("RGB", (50, 40), color) for color in ("red", "green")]
    # fmt: off
    import tdm_jax

    tdm_jax.list_models("deit*"); tdm_jax.list_reducers()  # noqa: E702
    model, variables = tdm_jax.load_pretrained("runs/digits")
    assert model.reducer == tdm_jax.make_reducer("evit", keep_rate=0.5, layers=(1,))

    model, variables = tdm_jax.load_pretrained("deit_small.pth", reducer="tdm", keep_rate=0.7, preset="published")  # noqa: E501
    preprocess = tdm_jax.preprocess(model)
    logits = jax.jit(model.apply)(variables, preprocess(images))
    x = preprocess(images)
    logits, info = model.apply(variables, x, return_info=True, intermediates=(3, 7, 11))
    dense = tdm_jax.unmerge(info)
    # fmt: on
    assert model.reducer == tdm_jax.make_reducer("tdm", keep_rate=0.7, preset="published")
    assert model.preprocessing == tdm_jax.Preprocessing()
    assert model.schedule[-1].out < 64
    assert logits.shape == (2, 3)
    assert not np.array_equal(logits[0], logits[1])
    assert dense.shape == (2, 64, 64)
