"""What stands beside weights: our own description, Hugging Face's, timm's; else DeiT's."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tdm_jax import Preprocessing, create_model, make_reducer
from tdm_jax.checkpoint import (
    describe,
    load_model,
    load_pretrained,
    save_model,
    save_safetensors,
)
from tdm_jax.checkpoint.descriptions import from_hugging_face, from_timm
from tdm_jax.errors import InputError
from tdm_jax.models.rotary import Rotary

GOLDENS = Path(__file__).parents[1] / "goldens"
DEIT = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 0.875, "bicubic")
OTHER = Preprocessing((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), 0.95, "bilinear")

# As the files of google/vit-base-patch16-224, facebook/deit-small-patch16-224 and of newer
# versions of transformers have it.
HF_VIT = {
    "do_normalize": True, "do_resize": True, "size": 224, "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}  # fmt: skip
HF_DEIT = {
    "crop_size": {"height": 224, "width": 224}, "do_center_crop": True, "do_normalize": True,
    "do_rescale": True, "do_resize": True, "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225], "resample": 3, "rescale_factor": 0.00392156862745098,
    "size": {"height": 256, "width": 256},
}  # fmt: skip
TIMM = {
    "architecture": "deit_tiny_patch16_224", "num_classes": 10, "num_features": 48,
    "pretrained_cfg": {
        "tag": "fb_in1k", "num_classes": 10, "input_size": [3, 64, 64],
        "interpolation": "bilinear", "crop_pct": 0.95, "crop_mode": "center",
        "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "first_conv": "patch_embed.proj",
    },
}  # fmt: skip


class TestOurs:
    def test_a_model_makes_itself_again(self, tiny_model):
        for reducer in ("none", "tdm", "sinkhorn"):
            settings = {} if reducer == "none" else {"layers": (1,), "keep_rate": 0.5}
            model, _ = tiny_model(reducer, preprocessing=OTHER, **settings)
            description = json.loads(json.dumps(describe(model)))
            assert create_model(**description) == model
            assert ("reducer" in description) == (reducer != "none")
        assert "preprocessing" not in describe(tiny_model()[0])

    @pytest.mark.parametrize("kind", ["orbax", "safetensors"])
    @pytest.mark.parametrize("preprocessing", [OTHER, None], ids=["said", "unsaid"])
    def test_reducer_and_preprocessing_travel(self, kind, preprocessing, tiny_model, tmp_path):
        """Defect A, and calibrated counts: what was saved is what is loaded."""
        calibrated = make_reducer("ats", layers=(0, 1), counts=(5, 3))
        model, variables = tiny_model(calibrated, preprocessing=preprocessing)
        path = tmp_path / ("model.safetensors" if kind == "safetensors" else "model")
        if kind == "safetensors":
            save_safetensors(path, model, variables)
        else:
            save_model(path, describe(model), variables)
        assert load_pretrained(path)[0] == model
        assert load_pretrained(path, "none")[0] == tiny_model(preprocessing=preprocessing)[0]
        given = Preprocessing((0.1,) * 3, (0.9,) * 3)
        assert load_pretrained(path, preprocessing=given)[0].preprocessing == given

    def test_a_learned_reducer_comes_with_its_weights(self, tiny_model, tmp_path):
        model, variables = tiny_model("dyvit", 0.5, layers=(1,))
        save_model(tmp_path / "model", describe(model), variables)
        again, back = load_pretrained(tmp_path / "model")
        assert again == model
        jax.tree.map(np.testing.assert_array_equal, back, variables)
        assert "reducer" not in load_pretrained(tmp_path / "model", "none")[1]["params"]

    def test_the_saved_reducer_is_changed_by_settings(self, tiny_model, tmp_path):
        model, variables = tiny_model("tdm", 0.7, layers=(1, 2))
        save_model(tmp_path / "model", describe(model), variables)
        changed = load_pretrained(tmp_path / "model", keep_rate=0.5, layers=(0, 1))[0].reducer
        assert changed == make_reducer("tdm", keep_rate=0.5, layers=(0, 1))
        with pytest.raises(InputError, match="did you mean 'layers'"):
            load_pretrained(tmp_path / "model", layer=None)

    def test_what_older_versions_wrote(self, tiny_model, tmp_path):
        """No reducer and no preprocessing: nothing is made up."""
        model, variables = tiny_model()
        save_model(tmp_path / "model", describe(model), variables)
        assert {"reducer", "preprocessing"}.isdisjoint(load_model(tmp_path / "model")[0])
        assert load_pretrained(tmp_path / "model")[0] == model

    def test_bad_descriptions(self, tiny_model, tmp_path):
        model, variables = tiny_model()
        for i, bad in enumerate(({"reducer": {"name": "tdn"}}, {"preprocessing": {"mean": [1]}})):
            save_model(tmp_path / f"{i}", describe(model) | bad, variables)
            with pytest.raises(InputError, match="it describes no model of ours") as error:
                load_pretrained(tmp_path / f"{i}")
            assert "\n" not in str(error.value)


class TestNone:
    def test_it_is_deits(self):
        loaded, _ = load_pretrained(GOLDENS / "facebook_deit.pth", num_heads=3)
        assert loaded.preprocessing == DEIT
        given = load_pretrained(GOLDENS / "facebook_deit.pth", num_heads=3, preprocessing=OTHER)
        assert given[0].preprocessing == OTHER

    @pytest.mark.parametrize(("pixels", "crop_pct"), [(224, 0.875), (384, 1.0)])
    def test_larger_images_are_not_cropped(self, pixels, crop_pct, tiny_model, tmp_path):
        model, variables = tiny_model(patch_size=32, image_size=pixels, num_heads=1, width=64)
        save_safetensors(tmp_path / "described.safetensors", model, variables)
        save_file(load_file(tmp_path / "described.safetensors"), tmp_path / "bare.safetensors")
        loaded = load_pretrained(tmp_path / "bare.safetensors")[0]
        assert loaded.preprocessing == Preprocessing(crop_pct=crop_pct)

    def test_nobody_knows_of_grey_images(self, tiny_model, tmp_path):
        model, variables = tiny_model(in_channels=1)
        save_safetensors(tmp_path / "described.safetensors", model, variables)
        save_file(load_file(tmp_path / "described.safetensors"), tmp_path / "bare.safetensors")
        assert load_pretrained(tmp_path / "bare.safetensors", num_heads=2)[0].preprocessing is None


class TestHuggingFace:
    @pytest.fixture
    def load(self, tmp_path):
        def load(processor, **config):
            shutil.copytree(GOLDENS / "hf_vit", tmp_path, dirs_exist_ok=True)
            file = tmp_path / "config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | config))
            text = processor if isinstance(processor, str) else json.dumps(processor)
            (tmp_path / "preprocessor_config.json").write_text(text)
            return load_pretrained(tmp_path)[0].preprocessing

        return load

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({}, DEIT),
            ({"size": 256, "crop_size": 224}, DEIT),
            ({"size": {"shortest_edge": 256}}, DEIT),
            ({"size": {"height": 256, "width": 320}}, DEIT),
            ({"do_center_crop": False}, Preprocessing(crop_pct=1.0)),
            ({"resample": 2}, Preprocessing(interpolation="bilinear")),
            ({"resample": 1}, Preprocessing(interpolation="lanczos")),
            ({"do_normalize": False}, Preprocessing((0.0,) * 3, (1.0,) * 3)),
        ],
        ids=str,
    )
    def test_of_deit(self, changes, expected, load):
        assert load(HF_DEIT | changes) == expected

    def test_of_vit(self, load):
        half = ((0.5,) * 3, (0.5,) * 3)
        assert load(HF_VIT) == Preprocessing(*half, 1.0, "bilinear")
        assert load(HF_VIT, model_type="deit") == Preprocessing(*half, 1.0, "bicubic")

    def test_scales_of_pixels(self, load):
        """Unscaled pixels, or such in [-1, 1], are normalised with other numbers to the same."""
        mean, std = np.array([120.0, 110.0, 100.0]), np.array([60.0, 50.0, 40.0])
        unscaled = {"do_rescale": False, "image_mean": list(mean), "image_std": list(std)}
        prepared = load(HF_DEIT | unscaled)
        np.testing.assert_allclose(prepared.mean, mean / 255)
        np.testing.assert_allclose(prepared.std, std / 255)
        double = load(HF_DEIT | {"rescale_factor": 2 / 255})
        np.testing.assert_allclose(double.mean, np.array(DEIT.mean) / 2)
        np.testing.assert_allclose(double.std, np.array(DEIT.std) / 2)

    def test_without_a_processor_it_is_deits(self):
        assert load_pretrained(GOLDENS / "hf_vit")[0].preprocessing == DEIT

    @pytest.mark.parametrize(
        ("processor", "message"),
        [
            ("{", "preprocessor_config.json: not valid JSON"),
            ({"resample": 4}, "expected resample 0.*; got 4"),
            ({"resample": [3]}, r"expected resample 0.*; got \[3\]"),
            ({"size": 224, "crop_size": 256}, "preprocessor_config.json: .*crop_pct"),
            ({"image_std": [0, 0, 0]}, "preprocessor_config.json: .*positive std"),
            ({"image_mean": "grey"}, "preprocessor_config.json: "),
            ({"rescale_factor": 0}, "preprocessor_config.json: "),
            ({"size": "224", "crop_size": 200}, "preprocessor_config.json: "),
            ({"image_mean": [0.5], "image_std": [0.5]}, "each of the 3 channels"),
        ],
        ids=str,
    )
    def test_refusals(self, processor, message, load):
        with pytest.raises(InputError, match=message) as error:
            load(processor if isinstance(processor, str) else HF_DEIT | processor)
        assert "\n" not in str(error.value)


class TestHuggingFaceClasses:
    """What a configuration leaves out is the default of its class in transformers 5.23."""

    @pytest.mark.parametrize(
        ("kind", "activation", "epsilon", "heads"),
        [
            ("vit", "gelu", 1e-12, 12),
            ("vit_mae", "gelu", 1e-12, 12),
            ("dinov2", "gelu", 1e-6, 12),
            ("dinov2_with_registers", "gelu", 1e-6, 12),
            ("dinov3_vit", "gelu", 1e-5, 6),
            ("siglip_vision_model", "gelu_tanh", 1e-6, 12),
            ("siglip2", "gelu_tanh", 1e-6, 12),
            ("clip", "quick_gelu", 1e-5, 12),
        ],
    )
    def test_defaults(self, kind, activation, epsilon, heads):
        known = from_hugging_face("x", {"model_type": kind}, None)
        assert known["activation"] == activation
        assert (known["layer_norm_eps"], known["num_heads"]) == (epsilon, heads)
        assert ("rotary" in known) == (kind == "dinov3_vit")

    def test_a_whole_models_vision_tower(self):
        vision = {"hidden_act": "gelu", "num_attention_heads": 16, "image_size": 384}
        config = {"model_type": "clip", "vision_config": vision, "projection_dim": 512}
        known = from_hugging_face("x", config | {"num_attention_heads": 8}, None)
        assert (known["activation"], known["num_heads"]) == ("gelu", 16)
        assert known["image_size"] == (384, 384)

    def test_a_gate_is_silu_whatever_is_said(self):
        config = {"model_type": "dinov2", "hidden_act": "gelu", "use_swiglu_ffn": True}
        assert from_hugging_face("x", config, None)["activation"] == "silu"

    def test_rotary_temperature(self):
        known = from_hugging_face("x", {"model_type": "dinov3_vit", "rope_theta": 50.0}, None)
        assert known["rotary"] == Rotary(50.0)


class TestTimm:
    def load(self, folder, config, weights="model.safetensors"):
        source = "facebook_deit.pth" if weights.endswith(".bin") else "timm_deit.safetensors"
        shutil.copy(GOLDENS / source, folder / weights)
        (folder / "config.json").write_text(json.dumps(config))
        return load_pretrained(folder, num_heads=3)

    @pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
    def test_folder(self, weights, tmp_path):
        model, variables = self.load(tmp_path, TIMM, weights)
        assert model.preprocessing == OTHER
        assert (model.image_size, model.num_classes) == ((64, 64), 10)
        _, expected = load_pretrained(GOLDENS / "facebook_deit.pth", num_heads=3)
        jax.tree.map(np.testing.assert_array_equal, variables, expected)

    def test_reference_grid_of_rotary_positions(self):
        config = {"architecture": "eva02_tiny_patch14_224.mim_in22k", "pretrained_cfg": {}}
        known = from_timm("x", config | {"model_args": {"ref_feat_shape": [24, 24]}})
        assert known["rotary"] == Rotary(10000.0, interleaved=True, reference_grid=24)

    def test_what_it_does_not_say_is_deits(self, tmp_path):
        assert self.load(tmp_path, {"pretrained_cfg": {}})[0].preprocessing == DEIT

    @pytest.mark.parametrize(
        ("pretrained", "message"),
        [
            ({"mean": [0.5]}, "config.json: preprocessing: expected a mean"),
            ({"interpolation": "random"}, "unknown interpolation 'random'"),
            ({"input_size": [3, 32, 32]}, "have 16 patches, the position embedding 64"),
            ({"input_size": "64"}, "image_size as one or two numbers"),
            ("none", "expected pretrained_cfg as an object"),
        ],
        ids=str,
    )
    def test_refusals(self, pretrained, message, tmp_path):
        with pytest.raises(InputError, match=message):
            self.load(tmp_path, {"pretrained_cfg": pretrained})

    def test_another_number_of_classes(self, tmp_path):
        with pytest.raises(InputError, match="says 7 classes, the head has 10"):
            self.load(tmp_path, TIMM | {"num_classes": 7})
