"""Parameters in timm's names: the exact inverse of loading."""

from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from tdm_jax.checkpoint import load_pretrained, save_safetensors, to_state_dict
from tdm_jax.errors import InputError

GOLDENS = Path(__file__).parents[1] / "goldens"


@pytest.mark.parametrize(
    ("checkpoint", "weights"),
    [("facebook_deit.pth", "vit_weights.npz"),
     ("facebook_deit_distilled.pth", "distilled_weights.npz")],
)  # fmt: skip
def test_exact_inverse(checkpoint, weights, tmp_path):
    model, params = load_pretrained(GOLDENS / checkpoint, num_heads=3)
    save_safetensors(tmp_path / "out.safetensors", model, params)
    expected, got = np.load(GOLDENS / weights), load_file(tmp_path / "out.safetensors")
    assert set(got) == set(expected.files)
    for name in expected.files:
        assert got[name].dtype == np.float32
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)


def test_hugging_face_to_timm_and_back(tmp_path):
    model, params = load_pretrained(GOLDENS / "hf_deit_distilled")
    save_safetensors(tmp_path / "timm.safetensors", model, params)
    again, back = load_pretrained(tmp_path / "timm.safetensors")
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, back, params)
    with safe_open(tmp_path / "timm.safetensors", "numpy") as file:
        assert file.metadata()["format"] == "pt"  # transformers and timm look for it


def test_nothing_is_overwritten_unasked(tmp_path):
    model, params = load_pretrained(GOLDENS / "hf_vit")
    path = tmp_path / "out.safetensors"
    path.write_text("precious")
    with pytest.raises(InputError, match="exists"):
        save_safetensors(path, model, params)
    with pytest.raises(InputError, match="with 'params'"):
        save_safetensors(path, model, params["params"], overwrite=True)
    wrong = {"params": {**params["params"], "extra": {"kernel": np.zeros(1)}}}
    with pytest.raises(InputError, match="'extra/kernel'"):
        save_safetensors(path, model, wrong, overwrite=True)
    assert path.read_text() == "precious"
    save_safetensors(path, model, params, overwrite=True)
    assert load_pretrained(path)[0] == model
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.safetensors"]


def test_state_dict_has_layout_of_torch():
    _, params = load_pretrained(GOLDENS / "hf_vit")
    arrays = to_state_dict(params)
    assert arrays["blocks.0.mlp.fc1.weight"].shape == (192, 48)
    assert all(array.flags.c_contiguous for array in arrays.values())
