"""Checkpoints of every kind: same logits as PyTorch, or one line that says what does not fit.

Covers checkpoint/architecture.py and checkpoint/weight_loader.py.
"""

import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file

from tdm_jax import Preprocessing, create_model
from tdm_jax.checkpoint import (
    describe,
    load_pretrained,
    read_state_dict,
    save_model,
    save_safetensors,
)
from tdm_jax.errors import InputError
from tdm_jax.models.rotary import Rotary
from tdm_jax.reduction import REDUCERS, make_reducer

GOLDENS = Path(__file__).parents[1] / "goldens"
IMAGES = np.load(GOLDENS / "images_nchw.npy").transpose(0, 2, 3, 1)
TINY = {
    "image_size": (16, 24), "patch_size": 8, "width": 12, "depth": 2, "num_heads": 2,
    "num_classes": 3,
}  # fmt: skip
EVA02 = Rotary(10000.0, interleaved=True, reference_grid=16)


def _golden(name):
    loaded = np.load(GOLDENS / name)
    return loaded if isinstance(loaded, np.ndarray) else loaded["logits"]


def _random_params(model, seed=0):
    """As `model.init` shapes them, without compiling it."""
    images = jax.ShapeDtypeStruct((1, *model.image_size, model.in_channels), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, images):
    return model.apply(params, images)


def _equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def tiny(tmp_path):
    """A small model, its parameters, and its timm-named file without a description."""
    model = create_model("vit", **TINY)
    params = _random_params(model)
    save_safetensors(tmp_path / "described.safetensors", model, params)
    arrays = load_file(tmp_path / "described.safetensors")
    save_file(arrays, tmp_path / "tiny.safetensors")
    return model, params, arrays


@pytest.mark.golden
@pytest.mark.parametrize(
    ("checkpoint", "golden", "options"),
    [
        ("facebook_deit.pth", "none.npz", {"num_heads": 3}),
        ("timm_deit.safetensors", "none.npz", {"num_heads": 3}),
        ("facebook_deit_distilled.pth", "distilled.npz", {"num_heads": 3}),
        ("hf_vit", "hf_vit/logits.npy", {}),
        ("hf_deit_distilled", "hf_deit_distilled/logits.npy", {}),
    ],
)
def test_same_logits_as_pytorch(checkpoint, golden, options):
    model, params = load_pretrained(GOLDENS / checkpoint, **options)
    np.testing.assert_allclose(_logits(model, params, IMAGES), _golden(golden), atol=1e-4)
    shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES[:1])
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )


@pytest.mark.golden
def test_same_blocks_as_pytorch():
    model, params = load_pretrained(GOLDENS / "facebook_deit.pth", num_heads=3)
    golden = np.load(GOLDENS / "none.npz")

    @jax.jit
    def blocks(params, images):
        of_blocks = lambda module, _: (module.name or "").startswith("blocks_")  # noqa: E731
        _, state = model.apply(params, images, capture_intermediates=of_blocks)
        outputs = state["intermediates"]
        return {i: outputs[f"blocks_{i}"]["__call__"][0].sequence() for i in (0, 3, 11)}

    for i, out in blocks(params, IMAGES).items():
        np.testing.assert_allclose(out, golden[f"block{i}"], atol=1e-4)


def test_names_of_transformers_5(tmp_path):
    """The same network under the names that transformers >= 5 has in memory."""
    arrays = read_state_dict(GOLDENS / "hf_deit_distilled")
    parts = {
        "encoder.layer.": "layers.", "attention.output.dense": "attention.o_proj",
        "attention.attention.query": "attention.q_proj", "intermediate.dense": "mlp.fc1",
        "attention.attention.key": "attention.k_proj", "output.dense": "mlp.fc2",
        "attention.attention.value": "attention.v_proj",
    }  # fmt: skip

    def renamed(name):
        for old, new in parts.items():
            name = name.replace(old, new)
        return name

    renamed_arrays = {renamed(name): array for name, array in arrays.items()}
    assert "deit.layers.11.attention.o_proj.bias" in renamed_arrays
    assert not any("encoder" in name or "dense" in name for name in renamed_arrays)
    save_file(renamed_arrays, tmp_path / "memory.safetensors")
    _, params = load_pretrained(tmp_path / "memory.safetensors", num_heads=3)
    _equal(params, load_pretrained(GOLDENS / "hf_deit_distilled")[1])


def test_heads_follow_from_the_width(tmp_path):
    model = create_model("vit", **TINY | {"width": 128, "num_heads": 4})
    save_model(
        tmp_path / "ours",
        {"name": "vit", **TINY, "width": 128, "num_heads": 4},
        _random_params(model),
    )
    arrays = read_state_dict(tmp_path / "ours")
    save_file(arrays, tmp_path / "timm.safetensors")
    assert load_pretrained(tmp_path / "ours")[0].num_heads == 4
    assert load_pretrained(tmp_path / "ours", num_heads=8)[0].num_heads == 8
    options = {"image_size": (16, 24)}
    assert load_pretrained(tmp_path / "timm.safetensors", **options)[0].num_heads == 2
    with pytest.raises(InputError, match="num_heads must divide the width 128"):
        load_pretrained(tmp_path / "timm.safetensors", num_heads=3, **options)


def test_with_a_reducer():
    model, params = load_pretrained(GOLDENS / "facebook_deit.pth", "evit", 0.5, num_heads=3)
    assert model.schedule[-1].out < 16
    _equal(params, load_pretrained(GOLDENS / "facebook_deit.pth", num_heads=3)[1])


class TestArchitecture:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"mlp_ratio": 3.25},
            {"distilled": True},
            {"class_token": False},
            {"num_registers": 3, "positions": "patches"},
            {"layer_scale": True, "interpolation": "bicubic"},
            {"pool": "avg", "fc_norm": True},
            {"pool": "map", "class_token": False, "activation": "gelu_tanh"},
            {"layer_norm_eps": 1e-5, "rotary": Rotary(), "positions": "none", "width": 16,
             "layer_scale": True, "qkv_bias": "", "pool": "avg"},
            {"rotary": EVA02, "qkv_bias": "qv", "gated_mlp": True, "activation": "silu",
             "width": 16, "pool": "avg", "fc_norm": True},
            {"pre_norm": True, "patch_bias": False},
            {"in_channels": 1},
            {"layer_norm_eps": 1e-3},
            {"depth": 1, "num_heads": 3},
        ],
        ids=str,
    )  # fmt: skip
    @pytest.mark.parametrize("kind", ["orbax", "safetensors"])
    def test_own_export_comes_back_whole(self, changes, kind, tmp_path):
        model = create_model("vit", **TINY | changes)
        params = _random_params(model)
        if kind == "orbax":
            path = tmp_path / "model"
            save_model(path, describe(model), params)
        else:
            path = tmp_path / "model.safetensors"
            save_safetensors(path, model, params)
        loaded, back = load_pretrained(path)
        assert loaded == model
        _equal(back, params)

    def test_mlp_that_is_no_round_multiple(self, tmp_path):
        for width, hidden in ((12, 25), (12, 11), (44, 87)):
            model = create_model("vit", **TINY | {"width": width, "mlp_ratio": hidden / width})
            if int(width * model.mlp_ratio) != hidden:
                model = model.clone(mlp_ratio=(hidden + 0.5) / width)
            save_safetensors(tmp_path / f"{hidden}.safetensors", model, _random_params(model))
            _, params = load_pretrained(tmp_path / f"{hidden}.safetensors")
            assert params["params"]["blocks_0"]["mlp"]["fc1"]["bias"].shape == (hidden,)

    def test_preset_by_name(self, tmp_path):
        config = {"name": "deit_tiny_patch16_224", "depth": 1, "image_size": 32}
        config |= {"reducer": "evit", "layers": (0,)}
        model = create_model(**config)
        save_model(tmp_path / "model", config, _random_params(model))
        assert load_pretrained(tmp_path / "model")[0] == model

    def test_square_grid_is_assumed_unless_told(self, tiny, tmp_path):
        model, params, _ = tiny
        with pytest.raises(InputError, match="6 patches, which is no square"):
            load_pretrained(tmp_path / "tiny.safetensors", num_heads=2)
        with pytest.raises(InputError, match="6 patches"):
            load_pretrained(tmp_path / "tiny.safetensors", num_heads=2, image_size=(24, 24))
        loaded, back = load_pretrained(
            tmp_path / "tiny.safetensors", num_heads=2, image_size=(16, 24)
        )
        assert loaded == model.clone(preprocessing=Preprocessing())
        _equal(back, params)
        assert load_pretrained(tmp_path / "described.safetensors")[0] == model

    def test_the_number_of_heads_cannot_be_guessed(self):
        with pytest.raises(InputError, match="width 48, which is no multiple of 64"):
            load_pretrained(GOLDENS / "facebook_deit.pth")

    def test_overrides(self):
        model, _ = load_pretrained(
            GOLDENS / "hf_vit", "evit", 0.7, layers=(2, 4), dtype=jnp.bfloat16, drop_path=0.1
        )
        assert (model.dtype, model.drop_path) == (jnp.bfloat16, 0.1)
        assert model.reducer.schedule.layers == (2, 4)
        with pytest.raises(InputError, match="did you mean 'drop_path'"):
            load_pretrained(GOLDENS / "hf_vit", droppath=0.1)


class TestTypes:
    @pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
    def test_other_precisions_become_float32(self, dtype, tiny, tmp_path):
        _, params, arrays = tiny
        arrays = {name: array.astype(dtype) for name, array in arrays.items()}
        save_file(arrays, tmp_path / "other.safetensors")
        _, back = load_pretrained(tmp_path / "other.safetensors", num_heads=2, image_size=(16, 24))
        assert {leaf.dtype for leaf in jax.tree.leaves(back)} == {np.dtype(np.float32)}
        rounded = jax.tree.map(lambda x: np.asarray(x).astype(dtype).astype(np.float32), params)
        _equal(jax.tree.map(np.asarray, back), rounded)

    def test_integers_are_no_weights(self, tiny, tmp_path):
        arrays = tiny[2] | {"norm.bias": np.zeros(12, np.int64)}
        save_file(arrays, tmp_path / "x.safetensors")
        with pytest.raises(InputError, match=r"misshapen: norm.bias int64\[12\]"):
            load_pretrained(tmp_path / "x.safetensors", num_heads=2, image_size=(16, 24))


class TestResolution:
    @pytest.mark.parametrize("checkpoint", ["hf_vit", "hf_deit_distilled"])
    def test_other_sizes(self, checkpoint):
        model, params = load_pretrained(GOLDENS / checkpoint, image_size=(48, 80))
        assert model.image_size == (48, 80)
        images = jax.ShapeDtypeStruct((1, 48, 80, 3), jnp.float32)
        assert jax.eval_shape(model.apply, params, images).shape == (1, 10)
        prefix = model.shape.prefix
        same = load_pretrained(GOLDENS / checkpoint)[1]["params"]["pos_embed"]
        np.testing.assert_array_equal(params["params"]["pos_embed"][:, :prefix], same[:, :prefix])
        assert params["params"]["pos_embed"].shape == (1, prefix + 60, 48)

    def test_one_number_is_a_square(self):
        model, _ = load_pretrained(GOLDENS / "hf_vit", image_size=96)
        assert model.image_size == (96, 96)
        with pytest.raises(InputError, match=r"hf_vit.*multiples of patch_size 8; got"):
            load_pretrained(GOLDENS / "hf_vit", image_size=60)


class TestHead:
    def test_another_count_needs_asking(self):
        with pytest.raises(InputError, match="reset_head starts with a fresh head") as error:
            load_pretrained(GOLDENS / "hf_deit_distilled", num_classes=4)
        for name in ("cls_classifier.weight", "distillation_classifier.bias"):
            assert name in str(error.value)

    @pytest.mark.parametrize("checkpoint", ["hf_vit", "hf_deit_distilled"])
    def test_fresh_head_alone(self, checkpoint):
        _, before = load_pretrained(GOLDENS / checkpoint)
        model, after = load_pretrained(GOLDENS / checkpoint, num_classes=4, reset_head=True)
        assert model.num_classes == 4
        heads = {"head", "head_dist"} & after["params"].keys()
        for head in heads:
            assert after["params"][head]["kernel"].shape == (48, 4)
            assert 0.01 < np.std(after["params"][head]["kernel"]) < 0.03
            assert not after["params"][head]["bias"].any()
        rest = [{k: v for k, v in p["params"].items() if k not in heads} for p in (before, after)]
        _equal(*rest)

    def test_two_fresh_heads_differ(self):
        _, params = load_pretrained(GOLDENS / "hf_deit_distilled", reset_head=True)
        kernels = [params["params"][head]["kernel"] for head in ("head", "head_dist")]
        assert not np.allclose(*kernels)

    def test_backbone_has_none(self, tiny, tmp_path):
        arrays = {name: a for name, a in tiny[2].items() if not name.startswith("head")}
        save_file(arrays, tmp_path / "backbone.safetensors")
        options = {"num_heads": 2, "image_size": (16, 24)}
        assert load_pretrained(tmp_path / "backbone.safetensors", **options)[0].num_classes == 0
        with pytest.raises(InputError, match=r"missing: head\.bias, head\.weight; reset_head"):
            load_pretrained(tmp_path / "backbone.safetensors", num_classes=3, **options)
        _, params = load_pretrained(
            tmp_path / "backbone.safetensors", num_classes=3, reset_head=True, **options
        )
        assert params["params"]["head"]["kernel"].shape == (12, 3)


class TestMisfits:
    def _load(self, tmp_path, arrays, **options):
        save_file(arrays, tmp_path / "x.safetensors")
        return load_pretrained(
            tmp_path / "x.safetensors", num_heads=2, **{"image_size": (16, 24), **options}
        )

    def test_all_in_one_line(self, tiny, tmp_path):
        arrays = dict(tiny[2])
        del arrays["blocks.0.attn.proj.bias"], arrays["blocks.1.attn.proj.bias"]
        arrays["neck.weight"] = np.zeros(3, np.float32)
        arrays["norm.weight"] = np.zeros(13, np.float32)
        with pytest.raises(InputError) as error:
            self._load(tmp_path, arrays)
        message = str(error.value)
        assert "missing: blocks.0,1.attn.proj.bias" in message
        assert "left over: neck.weight" in message
        assert "misshapen: norm.weight float32[13], expected [12]" in message
        assert "\n" not in message

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("pre_logits.fc.weight", "not supported: a layer between the final norm and the head"),
            ("blocks.0.attn.relative_position_bias_table", "not supported: relative position bias"),
            ("blocks.1.ls1.gamma", "left over: blocks.1.ls1.gamma"),
        ],
    )
    def test_parts_of_other_models(self, name, reason, tiny, tmp_path):
        with pytest.raises(InputError, match=reason):
            self._load(tmp_path, tiny[2] | {name: np.zeros(12, np.float32)})

    def test_what_a_classifier_does_not_use(self, tiny, tmp_path):
        extra = {"pooler.dense.weight": np.zeros((2, 2)), "embeddings.mask_token": np.zeros(1)}
        _equal(self._load(tmp_path, tiny[2] | extra)[1], tiny[1])

    def test_another_depth_or_width(self, tiny, tmp_path):
        with pytest.raises(InputError, match=r"left over: blocks\.1\."):
            self._load(tmp_path, tiny[2], depth=1)
        with pytest.raises(InputError, match=r"missing: blocks\.2\."):
            self._load(tmp_path, tiny[2], depth=3)
        with pytest.raises(
            InputError, match=r"cls_token float32\[1, 1, 12\], expected \[1, 1, 24\]"
        ):
            self._load(tmp_path, tiny[2], width=24)

    def test_distillation_token_without_its_head(self, tiny, tmp_path):
        model = create_model("vit", **TINY, distilled=True)
        save_safetensors(tmp_path / "d.safetensors", model, _random_params(model))
        arrays = load_file(tmp_path / "d.safetensors")
        arrays = {k: v for k, v in arrays.items() if not k.startswith("head_dist")}
        with pytest.raises(InputError, match=r"missing: head_dist\.bias, head_dist\.weight"):
            self._load(tmp_path, arrays)

    @pytest.mark.parametrize(
        "broken",
        [
            {"pos_embed": np.zeros((7, 12), np.float32)},
            {"blocks.0.mlp.fc1.weight": np.zeros(3, np.float32)},
            {"patch_embed.proj.weight": np.zeros((12, 3, 8, 4), np.float32)},
            {"patch_embed.proj.weight": np.zeros((12, 3), np.float32)},
            {"pos_embed": np.zeros((1, 0, 12), np.float32)},
            {"head.weight": np.zeros((0, 12), np.float32)},
            {"blocks.0.attn.qkv.weight": np.zeros((35, 12), np.float32)},
            {"cls_token": np.zeros((), np.float32)},
        ],
        ids=lambda broken: f"{next(iter(broken))}{next(iter(broken.values())).shape}",
    )
    def test_strange_shapes(self, broken, tiny, tmp_path):
        with pytest.raises(InputError) as error:
            self._load(tmp_path, tiny[2] | broken)
        assert "\n" not in str(error.value)
        assert "x.safetensors" in str(error.value)

    def test_not_a_vision_transformer(self, tmp_path):
        save_file({"conv1.weight": np.zeros((4, 3, 7, 7))}, tmp_path / "resnet.safetensors")
        with pytest.raises(InputError, match=r"not one vision transformer.*conv1.weight"):
            load_pretrained(tmp_path / "resnet.safetensors")


class TestReducerWeights:
    """With a learned method of any kind: here the first of the table that has weights."""

    @pytest.fixture
    def learned(self):
        name = next(name for name, kind in REDUCERS.items() if kind.learned)
        return make_reducer(name, keep_rate=0.5, layers=(1,))

    @pytest.mark.parametrize("kind", ["orbax", "safetensors"])
    def test_come_back_with_the_model(self, kind, learned, tmp_path):
        model = create_model("vit", learned, **TINY)
        params = _random_params(model, seed=5)
        path = tmp_path / ("model.safetensors" if kind == "safetensors" else "model")
        if kind == "orbax":
            save_model(path, {"name": "vit", **TINY}, params)
        else:
            save_safetensors(path, model, params)
        _equal(load_pretrained(path, learned)[1], params)
        _, plain = load_pretrained(path, "none")
        assert "reducer" not in plain["params"]

    def test_are_asked_for_by_name(self, learned, tiny, tmp_path):
        with pytest.raises(InputError, match=r"missing: reducer/.*expected its weights as extra"):
            load_pretrained(tmp_path / "described.safetensors", learned)

    def test_start_fresh_when_told(self, learned, tiny, tmp_path):
        path = tmp_path / "described.safetensors"
        _, params = load_pretrained(path, learned, fresh_reducer=True)
        expected = _random_params(create_model("vit", learned, **TINY))
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, expected)

    def test_wrong_ones_are_listed(self, learned, tiny, tmp_path):
        with pytest.raises(InputError):
            load_pretrained(
                tmp_path / "described.safetensors", learned, extra_weights={"x": np.zeros(3)}
            )


def test_extra_weights_without_a_use():
    with pytest.raises(InputError, match="no weights of its own"):
        load_pretrained(GOLDENS / "hf_vit", extra_weights={"x": np.zeros(1)})


class TestHuggingFaceConfig:
    @pytest.fixture
    def folder(self, tmp_path):
        shutil.copytree(GOLDENS / "hf_vit", tmp_path / "hf")
        return tmp_path / "hf"

    def _change(self, folder, **changes):
        file = folder / "config.json"
        config = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    def test_epsilon_and_heads_are_read(self, folder):
        self._change(folder, layer_norm_eps=1e-12, num_attention_heads=4)
        model, _ = load_pretrained(folder)
        assert (model.layer_norm_eps, model.num_heads) == (1e-12, 4)

    def test_image_size_may_be_a_pair(self, folder):
        self._change(folder, image_size=[32, 128])
        model, params = load_pretrained(folder)
        assert model.image_size == (32, 128)
        _equal(params, load_pretrained(GOLDENS / "hf_vit")[1])

    def test_no_biases(self, folder):
        self._change(folder, qkv_bias=False)
        arrays = load_file(folder / "model.safetensors")
        arrays = {
            k: v
            for k, v in arrays.items()
            if not k.endswith(("query.bias", "key.bias", "value.bias"))
        }
        save_file(arrays, folder / "model.safetensors")
        _, params = load_pretrained(folder)
        assert "bias" not in params["params"]["blocks_3"]["attn"]["qkv"]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"hidden_act": "relu"}, "unknown hidden_act in .*config.json 'relu'"),
            ({"model_type": "swin"}, "model_type 'swin' is another architecture; expected vit, "),
            ({"vision_config": 3}, "expected vision_config as an object; got 3"),
            ({"num_attention_heads": "3"}, "positive int for num_attention_heads; got '3'"),
            ({"layer_norm_eps": -1}, "positive float for layer_norm_eps"),
            ({"image_size": [1, 2, 3]}, "image_size as one or two numbers"),
            ({"image_size": 32}, "have 16 patches, the position embedding 64"),
            ({"id2label": {"0": "cat"}}, "says 1 classes, the head has 10"),
            ({"id2label": None, "num_labels": 7}, "says 7 classes, the head has 10"),
            ({"num_attention_heads": 5}, "num_heads must divide"),
        ],
        ids=str,
    )
    def test_bad_values(self, change, message, folder):
        self._change(folder, **change)
        with pytest.raises(InputError, match=message):
            load_pretrained(folder)

    def test_damaged_files(self, folder):
        (folder / "config.json").write_text("{")
        with pytest.raises(InputError, match=r"config.json: not valid JSON"):
            load_pretrained(folder)
        (folder / "config.json").write_text("[]")
        with pytest.raises(InputError, match="expected a JSON object; got list"):
            load_pretrained(folder)
        (folder / "model.safetensors").unlink()
        with pytest.raises(InputError, match=r"expected config\.json with model.safetensors"):
            load_pretrained(folder)


class TestObjectStore:
    """Defect M: files in gs:// are read as those on a disk are; a folder stands for the bucket."""

    @pytest.mark.parametrize(
        "name", ["facebook_deit.pth", "timm_deit.safetensors", "hf_vit", "hf_deit_distilled"]
    )
    def test_files_and_folders(self, name, bucket):
        copy = shutil.copytree if (GOLDENS / name).is_dir() else shutil.copy
        copy(GOLDENS / name, bucket / name)
        model, variables = load_pretrained(f"gs://bucket/{name}", num_heads=3)
        expected, same = load_pretrained(GOLDENS / name, num_heads=3)
        assert model == expected
        _equal(variables, same)

    def test_older_torch_files_and_descriptions(self, bucket, tiny):
        legacy = GOLDENS / "torch_files" / "training_legacy.pth"
        shutil.copy(legacy, bucket)
        arrays = read_state_dict("gs://bucket/training_legacy.pth")
        _equal(dict(arrays), dict(read_state_dict(legacy)))
        assert load_pretrained("gs://bucket/described.safetensors")[0] == tiny[0]

    def test_refusals(self, bucket):
        with pytest.raises(InputError, match="gs://bucket/missing.pth: no such file"):
            load_pretrained("gs://bucket/missing.pth")
        for name in ("facebook_deit.pth", "timm_deit.safetensors"):
            (bucket / name).write_bytes((GOLDENS / name).read_bytes()[:3000])
            with pytest.raises(InputError, match=f"gs://bucket/{name}.*truncated") as error:
                load_pretrained(f"gs://bucket/{name}")
            assert "\n" not in str(error.value)


def test_a_store_that_cannot_be_reached(monkeypatch):
    def unreachable(self, path):
        raise ImportError("no module\nnamed gcsfs")

    monkeypatch.setattr(type(epath.backend.fsspec_backend), "fs", unreachable)
    with pytest.raises(InputError, match="cannot reach gs://bucket/x.pth: .*pip install gcsfs"):
        load_pretrained("gs://bucket/x.pth")
