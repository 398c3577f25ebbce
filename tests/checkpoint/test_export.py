"""Models in the names of timm and of Hugging Face: checkpoint/timm.py, checkpoint/hugging_face.py.

`goldens/backbones/written.json` has, of small models, the arrays and the configuration that timm
1.0.31 and transformers 5.23 wrote; of the blocks the first alone.
"""

import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tdm_jax import Preprocessing, create_model, list_models
from tdm_jax.checkpoint import load_pretrained, save_safetensors, to_state_dict
from tdm_jax.checkpoint.export import save_hugging_face, save_timm
from tdm_jax.checkpoint.hugging_face import hugging_face_config
from tdm_jax.errors import InputError

GOLDENS = Path(__file__).parents[1] / "goldens"
WRITTEN = json.loads((GOLDENS / "backbones" / "written.json").read_text())
TIMM = [name for name in WRITTEN if name.startswith("timm")]
HUGGING_FACE = [name for name in WRITTEN if name.startswith("hf")]


def _model(name, tiny_model, **settings):
    fields = {**WRITTEN[name]["model"], **settings}
    return tiny_model(**{key: value for key, value in fields.items() if key != "name"})


def _same(one, other, but=()):
    """The same model and variables, but for some fields."""
    for field in dataclasses.fields(one[0]):
        if field.name not in ("parent", "name", *but):
            assert getattr(one[0], field.name) == getattr(other[0], field.name), field.name
    assert jax.tree.structure(one[1]) == jax.tree.structure(other[1])
    jax.tree.map(np.testing.assert_array_equal, one[1], other[1])


def _shapes(path):
    arrays = load_file(path)
    assert all(array.dtype == np.float32 for array in arrays.values())
    first = {name for name in arrays if not re.search(r"\.[1-9]\.", name)}
    return {name: list(arrays[name].shape) for name in first}


def _without_description(folder):
    """As another program would have written it: config.json says it all."""
    arrays = load_file(folder / "model.safetensors")
    save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("name", TIMM)
def test_as_timm_writes_it(name, tiny_model, tmp_path):
    made = _model(name, tiny_model, preprocessing=Preprocessing(crop_pct=1.0))
    save_safetensors(tmp_path / "a.safetensors", *made)
    assert _shapes(tmp_path / "a.safetensors") == WRITTEN[name]["arrays"]
    _same(load_pretrained(tmp_path / "a.safetensors"), made)
    save_timm(tmp_path / "a", *made)
    _same(load_pretrained(tmp_path / "a"), made)
    _same(load_pretrained(_without_description(tmp_path / "a")), made)


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_as_hugging_face_writes_it(name, tiny_model, tmp_path):
    made = _model(name, tiny_model, preprocessing=Preprocessing(crop_pct=1.0))
    save_hugging_face(tmp_path / "a", *made)
    assert _shapes(tmp_path / "a" / "model.safetensors") == WRITTEN[name]["arrays"]
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    expected = WRITTEN[name]["config"]
    assert {key: config[key] for key in expected} == expected
    assert set(config) - set(expected) <= {"dtype"}
    _same(load_pretrained(tmp_path / "a"), made)
    _same(load_pretrained(_without_description(tmp_path / "a")), made)


@pytest.mark.parametrize("name", [name for name in HUGGING_FACE if "reg_cls" not in name])
def test_from_hugging_face_to_timm_and_back(name, tiny_model, tmp_path):
    made = _model(name, tiny_model)
    if made[0].pooling == "token_avg":
        with pytest.raises(InputError, match="timm has no pool='token_avg'"):
            save_safetensors(tmp_path / "a.safetensors", *made)
        return
    save_safetensors(tmp_path / "a.safetensors", *made)
    timm = load_pretrained(tmp_path / "a.safetensors")
    save_hugging_face(tmp_path / "a", *timm)
    back = load_pretrained(tmp_path / "a")
    if name != "hf_dinov2_reg":  # its class position has become a part of the class token
        _same(back, made)
    assert _shapes(tmp_path / "a" / "model.safetensors") == WRITTEN[name]["arrays"]


def test_registers_without_position_get_zeros(tiny_model, tmp_path):
    made = _model("hf_dinov2_reg", tiny_model, positions="patches")
    save_hugging_face(tmp_path / "a", *made)
    table = load_file(tmp_path / "a" / "model.safetensors")["embeddings.position_embeddings"]
    assert not table[0, 0].any()
    np.testing.assert_array_equal(table[:, 1:], made[1]["params"]["pos_embed"])


def test_dinov3_without_registers(tiny_model, tmp_path):
    save_hugging_face(tmp_path / "a", *_model("hf_dinov3", tiny_model, num_registers=0))
    arrays = load_file(tmp_path / "a" / "model.safetensors")
    assert arrays["embeddings.register_tokens"].shape == (1, 0, 48)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("timm_eva02", {}, "DINOv3 alone; got EVA-02's"),
        ("timm_mae_ft", {}, "ViTForImageClassification has fc_norm=False; got True"),
        ("timm_siglip_cls", {}, "no SiglipVisionModel with a head; got num_classes=10: expected"),
        ("timm_deit3", {}, r"Dinov2ForImageClassification has pool='token_avg'; got 'token'"),
        ("timm_dinov2", {}, "a whole mlp_ratio; got 72 channels for a width of 48"),
        ("timm_dinov3", {}, "DINOv3ViTModel has pool='token'; got 'avg': expected --pool=token"),
        ("timm_clip", {}, "CLIPVisionModelWithProjection has head_bias=False; got True"),
        ("hf_siglip", {"pool": "avg"}, "SiglipVisionModel has pool='map'; got 'avg'"),
        ("hf_clip", {"layer_scale": True}, "layer_scale=False; got True"),
    ],
)
def test_what_hugging_face_has_not(name, fields, message, tiny_model, tmp_path):
    made = _model(name, tiny_model, **fields)
    with pytest.raises(InputError, match=message) as error:
        save_hugging_face(tmp_path / "a", *made)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_weights_of_a_learned_reducer(tiny_model, tmp_path):
    made = tiny_model("dyvit", 0.5, layers=(1,))
    with pytest.raises(InputError, match="no place for the weights of DynamicViT"):
        save_hugging_face(tmp_path / "a", *made)
    save_timm(tmp_path / "b", *made)
    _same(load_pretrained(tmp_path / "b"), made)


def test_a_reducer_goes_along(tiny_model, tmp_path):
    made = tiny_model("tdm", 0.5, layers=(1,))
    save_hugging_face(tmp_path / "a", *made)
    _same(load_pretrained(tmp_path / "a"), made)


def test_an_epsilon_that_no_architecture_has(tiny_model, tmp_path):
    with pytest.raises(InputError, match="layer_norm_eps=1e-06; got 1e-12: expected --layer_norm"):
        save_timm(tmp_path / "a", *tiny_model(layer_norm_eps=1e-12))
    assert not list(tmp_path.iterdir())


def test_processor(tiny_model, tmp_path):
    prepared = Preprocessing((0.5,) * 3, (0.25,) * 3, 0.8, "bilinear")
    save_hugging_face(tmp_path / "a", *tiny_model(preprocessing=prepared))
    again, _ = load_pretrained(_without_description(tmp_path / "a"))
    assert again.preprocessing == prepared


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
    with safe_open(tmp_path / "out.safetensors", "numpy") as file:
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


@pytest.mark.parametrize("save", [save_timm, save_hugging_face])
def test_no_folder_is_overwritten_unasked(save, tiny_model, tmp_path):
    made, other = tiny_model(), tiny_model(depth=2)
    save(tmp_path / "a", *made)
    with pytest.raises(InputError, match="--overwrite would replace it"):
        save(tmp_path / "a", *other)
    save(tmp_path / "a", *other, overwrite=True)
    _same(load_pretrained(tmp_path / "a"), other)
    (tmp_path / "a" / "notes.txt").write_text("precious")
    with pytest.raises(InputError, match="not an exported model, so it stays"):
        save(tmp_path / "a", *made, overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        save(tmp_path / "file" / "b", *made)


def test_state_dict_has_layout_of_torch():
    arrays = to_state_dict(*load_pretrained(GOLDENS / "hf_vit"))
    assert arrays["blocks.0.mlp.fc1.weight"].shape == (192, 48)
    assert all(array.flags.c_contiguous for array in arrays.values())


@pytest.mark.parametrize("name", list_models("*dinov[23]*") + list_models("*clip*"))
def test_published_models_have_a_class(name):
    """Whole ratios of the MLP among others: DINOv2's config.json can hold nothing else."""
    config = hugging_face_config(create_model(name, pool="token"))
    assert config["num_hidden_layers"] == create_model(name).depth
    assert config.get("mlp_ratio", 4) == 4
