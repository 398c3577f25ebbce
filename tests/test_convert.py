"""The command that converts, and checkpoint/conversion.py: what they write, print, and refuse."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags

from tdm_jax import Preprocessing, make_reducer
from tdm_jax.checkpoint import describe, load_model, load_pretrained, save_model
from tdm_jax.checkpoint.conversion import convert
from tdm_jax.convert import _image_size
from tdm_jax.errors import InputError

GOLDENS = Path(__file__).parent / "goldens"
FILES = GOLDENS / "torch_files"


def _run(*arguments):
    """The command in a process of its own, as a user has it."""
    return subprocess.run(
        [sys.executable, "-m", "tdm_jax.convert", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        check=False,
    )


def _equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_command(tmp_path):
    done = _run(f"--input={GOLDENS / 'hf_deit_distilled'}", f"--output={tmp_path / 'model'}")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = {tuple(line.split(maxsplit=2)) for line in done.stdout.splitlines()}
    assert ("distillation_classifier.weight", "head_dist/kernel", "[48, 10]") in lines
    qkv = "deit.encoder.layer.3.attention.attention.{query,key,value}.weight"
    assert (qkv, "blocks_3/attn/qkv/kernel", "[48, 144]") in lines
    assert "352,868 parameters" in done.stdout
    _equal(
        load_pretrained(tmp_path / "model")[1], load_pretrained(GOLDENS / "hf_deit_distilled")[1]
    )


def test_refusal_is_one_line_and_writes_nothing(tmp_path):
    done = _run(f"--input={FILES / 'malicious.pth'}", f"--output={tmp_path / 'model'}")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "system" in done.stderr
    assert not list(tmp_path.iterdir())


def test_round_trip_through_every_format(tmp_path):
    source = GOLDENS / "facebook_deit_distilled.pth"
    _, expected, same = convert(source, tmp_path / "a", num_heads=3)
    convert(tmp_path / "a", tmp_path / "b.safetensors")
    convert(tmp_path / "b.safetensors", tmp_path / "c")
    model, params = load_pretrained(tmp_path / "c")
    assert model == expected
    _equal(params, same)
    config, _ = load_model(tmp_path / "c")
    assert config["num_heads"] == 3


@pytest.mark.parametrize("reducer", ["ats", "dyvit"])
def test_reducer_and_preprocessing_go_along(reducer, tiny_model, tmp_path):
    """Calibrated counts, a learned method's weights, and how images are prepared."""
    counts = {"counts": (5, 3)} if reducer == "ats" else {"keep_rate": 0.5}
    prepared = Preprocessing((0.5,) * 3, (0.25,) * 3, 0.9, "bilinear")
    made = make_reducer(reducer, layers=(0, 1), **counts)
    model, variables = tiny_model(made, preprocessing=prepared)
    save_model(tmp_path / "a", describe(model), variables)
    convert(tmp_path / "a", tmp_path / "b.safetensors")
    convert(tmp_path / "b.safetensors", tmp_path / "c")
    for name in ("b.safetensors", "c"):
        again, same = load_pretrained(tmp_path / name)
        assert again == model
        _equal(same, variables)


@pytest.mark.parametrize("format", ["timm", "hugging_face", "orbax"])
def test_formats(format, tiny_model, tmp_path):
    model, variables = tiny_model("tdm", 0.5, layers=(1,))
    save_model(tmp_path / "a", describe(model), variables)
    convert(tmp_path / "a", tmp_path / "b", format=format)
    with pytest.raises(InputError, match="exists; expected a new name, or --overwrite"):
        convert(tmp_path / "a", tmp_path / "b", format=format)
    convert(tmp_path / "a", tmp_path / "b", format=format, overwrite=True)
    again, same = load_pretrained(tmp_path / "b")
    assert again == model
    _equal(same, variables)


def test_format_and_name_disagree(tmp_path):
    with pytest.raises(InputError, match="--format=hugging_face writes a folder; got"):
        convert(GOLDENS / "hf_vit", tmp_path / "a.safetensors", format="hugging_face")
    with pytest.raises(InputError, match="unknown format 'flax'"):
        convert(GOLDENS / "hf_vit", tmp_path / "a", format="flax")


def test_command_of_a_format(tmp_path):
    done = _run(
        f"--input={GOLDENS / 'hf_vit'}", f"--output={tmp_path / 'a'}", "--format=hugging_face",
        "--num_classes=0", "--activation=gelu_tanh", "--layer_norm_eps=1e-5", "--pool=token",
        "--interpolation=bicubic",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert load_pretrained(tmp_path / "a")[0].activation == "gelu_tanh"
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["architectures"] == ["ViTModel"]
    assert config["hidden_act"] == "gelu_pytorch_tanh"
    assert config["layer_norm_eps"] == 1e-5


def test_another_resolution(tmp_path):
    convert(GOLDENS / "hf_vit", tmp_path / "a", image_size=(32, 96))
    assert load_pretrained(tmp_path / "a")[0].image_size == (32, 96)


def test_nothing_is_overwritten_unasked(tmp_path):
    output = tmp_path / "model"
    convert(GOLDENS / "hf_vit", output)
    before = load_pretrained(output)[1]
    with pytest.raises(InputError, match="exists; expected a new name, or --overwrite"):
        convert(GOLDENS / "hf_deit_distilled", output)
    (tmp_path / "cut.pth").write_bytes((GOLDENS / "facebook_deit.pth").read_bytes()[:5000])
    with pytest.raises(InputError, match="truncated"):
        convert(tmp_path / "cut.pth", output, overwrite=True)
    _equal(load_pretrained(output)[1], before)
    convert(GOLDENS / "hf_deit_distilled", output, overwrite=True)
    assert load_pretrained(output)[0].distilled
    with pytest.raises(InputError, match="no model that this command wrote"):
        convert(GOLDENS / "hf_vit", tmp_path, overwrite=True)
    assert output.is_dir()


def test_averaged_weights(tmp_path):
    with pytest.raises(InputError, match="expected model_ema or state_dict_ema; got model"):
        convert(GOLDENS / "facebook_deit.pth", tmp_path / "a", ema=True)
    with pytest.raises(InputError, match="no moving average"):
        convert(GOLDENS / "hf_vit", tmp_path / "a", ema=True)


@pytest.mark.parametrize(
    ("sides", "size"),
    [(None, None), (["64"], (64, 64)), (["32", "96"], (32, 96))],
)
def test_image_size_flag(sides, size):
    assert _image_size(sides) == size


@pytest.mark.parametrize("sides", [[], ["1", "2", "3"], ["big"], ["-3"]])
def test_bad_image_size_flag(sides):
    with pytest.raises(InputError, match="expected height,width"):
        _image_size(sides)


def test_importing_defines_no_flags():
    assert "num_heads" not in flags.FLAGS
