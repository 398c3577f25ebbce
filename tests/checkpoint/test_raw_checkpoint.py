"""Every kind of file and folder that weights come in, read as it is."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tdm_jax.checkpoint import read_state_dict
from tdm_jax.checkpoint.export import METADATA
from tdm_jax.checkpoint.raw_checkpoint import read_raw_checkpoint
from tdm_jax.errors import InputError
from tests.checkpoint.torch_writer import write_state_dict

GOLDENS = Path(__file__).parents[1] / "goldens"
FILES = GOLDENS / "torch_files"
EXPECTED = np.load(FILES / "expected.npz")


@pytest.mark.parametrize("name", ["training.pth", "training_legacy.pth"])
@pytest.mark.parametrize(("ema", "key"), [(False, "model"), (True, "model_ema")])
def test_training_checkpoint(name, ema, key):
    arrays = read_state_dict(FILES / name, ema=ema)
    assert list(arrays) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    for entry, array in arrays.items():
        np.testing.assert_array_equal(array, EXPECTED[f"{name}:{key}.{entry}"])


def test_bare_state_dict():
    assert set(read_state_dict(FILES / "zip.pth")) == {"a", "b", "scalar", "empty"}


def test_safetensors_with_bfloat16(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3).astype(ml_dtypes.bfloat16)
    save_file({"a": array}, tmp_path / "x.safetensors")
    got = read_state_dict(tmp_path / "x.safetensors")["a"]
    assert got.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(got.astype(np.float32), array.astype(np.float32))


def test_hugging_face_folder():
    checkpoint = read_raw_checkpoint(GOLDENS / "hf_vit")
    assert checkpoint.description == {
        "image_size": (64, 64), "num_heads": 3, "num_classes": 10, "layer_norm_eps": 1e-6,
        "activation": "gelu",
    }  # fmt: skip
    assert "vit.encoder.layer.0.attention.attention.query.weight" in checkpoint.arrays


def test_hugging_face_folder_with_pickle(tmp_path):
    (tmp_path / "config.json").write_text((GOLDENS / "hf_vit" / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes((FILES / "zip.pth").read_bytes())
    checkpoint = read_raw_checkpoint(tmp_path)
    assert checkpoint.description["num_heads"] == 3
    assert set(checkpoint.arrays) == {"a", "b", "scalar", "empty"}


def test_sharded_folders(tmp_path):
    (tmp_path / "config.json").write_text((GOLDENS / "hf_vit" / "config.json").read_text())
    (tmp_path / "part.bin").write_bytes((FILES / "zip.pth").read_bytes())
    index = {"weight_map": {"a": "part.bin", "b": "part.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    checkpoint = read_raw_checkpoint(tmp_path)
    assert set(checkpoint.arrays) == {"a", "b"}
    assert checkpoint.description["num_heads"] == 3
    save_file({"c": np.ones(2)}, tmp_path / "part.safetensors")
    index = {"weight_map": {"c": "part.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(read_raw_checkpoint(tmp_path).arrays) == {"c"}  # preferred to a pickle


def test_npz(tmp_path):
    arrays = {"cls": np.ones((1, 1, 4), np.float32), "params/bf": np.ones(2, ml_dtypes.bfloat16)}
    np.savez(tmp_path / "x.npz", **arrays)
    got = read_state_dict(tmp_path / "x.npz")
    assert {name: array.dtype for name, array in got.items()} == {
        name: array.dtype for name, array in arrays.items()
    }
    with pytest.raises(InputError, match="no moving average here"):
        read_raw_checkpoint(tmp_path / "x.npz", ema=True)


def test_teacher_of_a_training_of_dino(tmp_path):
    """Its backbone, without the head beside it."""
    arrays = {"backbone.a": np.ones(2), "dino_head.b": np.ones(3)}
    path = write_state_dict(tmp_path / "dino.pth", arrays, under="teacher")
    got = read_state_dict(path)
    assert {name: array.shape for name, array in got.items()} == {"a": (2,)}


@pytest.mark.parametrize("size", [0, 4, 20, 2000])
def test_truncated_safetensors(size, tmp_path):
    path = tmp_path / "cut.safetensors"
    path.write_bytes((GOLDENS / "timm_deit.safetensors").read_bytes()[:size])
    with pytest.raises(InputError, match=r"not a readable \.safetensors") as error:
        read_raw_checkpoint(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("{", "not valid JSON"),
        ("3", "expected a JSON object"),
        (json.dumps({"name": "vit"}), "describes no model of ours.*needs a value"),
        (json.dumps({"name": "resnet"}), "unknown model 'resnet'"),
        (json.dumps({"colour": 3}), "describes no model of ours"),
    ],
)
def test_bad_description(description, message, tmp_path):
    save_file({"a": np.zeros(1)}, tmp_path / "x.safetensors", {METADATA: description})
    with pytest.raises(InputError, match=message):
        read_raw_checkpoint(tmp_path / "x.safetensors")


def test_wrong_places(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        read_raw_checkpoint(tmp_path / "missing")
    with pytest.raises(InputError, match=r"no checkpoint in this folder.*got nothing"):
        read_raw_checkpoint(tmp_path)
    with pytest.raises(InputError, match=r"expected named tensors.*got args, epoch"):
        read_raw_checkpoint(_without_weights(tmp_path))


def _without_weights(tmp_path):
    """A training checkpoint whose weights go by another name: 'model' becomes 'xodel'."""
    content = (FILES / "training_legacy.pth").read_bytes()
    path = tmp_path / "renamed.pth"
    path.write_bytes(content.replace(b"\x05\x00\x00\x00model", b"\x05\x00\x00\x00xodel"))
    return path
