"""Checkpoints of every family: the answers of the programs that they come from.

Covers checkpoint/families.py. The networks in goldens/backbones are small and random; timm 1.0.31
and transformers 5.23 (torch 2.13) wrote them, and answered to one image of each size.
"""

import dataclasses
import functools
import json
import re
import shutil
import weakref
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tdm_jax import create_model, list_models
from tdm_jax.checkpoint import load_pretrained
from tdm_jax.checkpoint.families import defaults
from tdm_jax.checkpoint.names import Naming, to_torch
from tdm_jax.checkpoint.raw_checkpoint import RawCheckpoint, read_raw_checkpoint
from tdm_jax.errors import InputError
from tdm_jax.models.rotary import Rotary
from tests.checkpoint.torch_writer import write_state_dict

GOLDENS = Path(__file__).parents[1] / "goldens" / "backbones"
RUNS = [
    pytest.param(file, id=f"{file.parent.name}-{file.stem.removeprefix('expected_')}")
    for file in sorted(GOLDENS.glob("*/expected_*.npz"))
]
CASES = {file.parent.name: file for file in sorted(GOLDENS.glob("*/expected_*.npz"))}
# Whose program calls "last hidden state" what no norm has seen yet.
UNNORMED = ("hf_clip",)


def _weights(case):
    file = GOLDENS / case / "weights.npz"
    return file if file.exists() else GOLDENS / case


def _size(expected):
    height, width = expected.stem.removeprefix("expected_").split("x")
    return int(height), int(width)


def _images(size):
    return np.load(GOLDENS / f"{size[0]}x{size[1]}.npy").transpose(0, 2, 3, 1)


@functools.partial(jax.jit, static_argnums=0)
def _run(model, variables, images):
    return model.apply(variables, images, return_info=True, intermediates=(0, model.depth - 1))


def _flat(variables):
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    return {"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}


def _same(one, other):
    one, other = _flat(one), _flat(other)
    assert one.keys() == other.keys()
    for path, array in one.items():
        np.testing.assert_array_equal(array, other[path], err_msg=path)


@pytest.mark.golden
def test_there_are_all_kinds_and_they_are_small():
    assert len(CASES) == 18
    assert sum(file.stat().st_size for file in GOLDENS.rglob("*.*")) < 8e6


@pytest.mark.golden
@pytest.mark.parametrize("expected", RUNS)
def test_same_as_the_original(expected):
    case, size = expected.parent.name, _size(expected)
    golden = dict(np.load(expected))
    model, variables = load_pretrained(_weights(case), image_size=size)
    out, info = _run(model, variables, _images(size))
    first, last = (state.features for state in info.intermediates)
    found = {"block_first": first, "block_last": last, "tokens": info.features}
    found["last_hidden_state"] = last if case.startswith(UNNORMED) else info.features
    answers = ("logits", "image_embeds", "pooler_output", "pooled")
    found |= {next((name for name in answers if name in golden), "none"): out}
    if "pos_embed_resampled" in golden:
        found["pos_embed_resampled"] = variables["params"]["pos_embed"]
    compared = golden.keys() & found.keys()
    assert len(compared) >= 3
    for name in compared:
        np.testing.assert_allclose(found[name], golden[name], atol=1e-4, err_msg=name)


@pytest.mark.golden
@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("hf_clip_full", "pooler_output"),
        ("timm_mae_ft", "pooled"),
        ("timm_siglip_cls", "pooled"),
        ("timm_dinov3_plus", "pooled"),
    ],
)
def test_without_a_head_it_is_the_pooled_feature(case, name):
    model, variables = load_pretrained(_weights(case), num_classes=0)
    assert "head" not in variables["params"]
    out, _ = _run(model, variables, _images(model.image_size))
    np.testing.assert_allclose(out, np.load(CASES[case])[name], atol=1e-4)


def _unused(*names):
    return dict.fromkeys(names, np.zeros((2, 2), np.float32))


# What stands in people's files beside the vision tower.
TEXT = _unused(
    "text_model.encoder.layers.0.mlp.fc1.weight", "text_projection.weight", "logit_scale"
)
OPENCLIP_TEXT = _unused("transformer.resblocks.0.ln_1.weight", "positional_embedding")
BIG_VISION_TEXT = _unused("params/txt/Embed_0/embedding", "params/t")
MAE = _unused("decoder_blocks.0.attn.qkv.weight", "decoder_embed.weight", "mask_token")
HF_MAE = _unused("decoder.decoder_layers.0.attention.attention.query.weight", "decoder.mask_token")
MASK = _unused("mask_token")
OPENAI = {"activation": "quick_gelu", "interpolation": "bicubic"}
MAE_HF = {"layer_norm_eps": 1e-12, "interpolation": "bicubic"}


def _named(scheme, *forms, prefix="", **settings):
    return Naming(scheme, prefix, frozenset(forms), **settings)


@pytest.mark.parametrize(
    ("case", "naming", "others", "settings"),
    [
        ("hf_vit_cls", _named("hf", "q_proj", prefix="vit."), {}, {}),
        ("hf_dinov2_reg", _named("hf", "layer_scale1", "q_proj"), MASK, {}),
        ("hf_dinov2_cls", _named("hf", "layer_scale1", "q_proj", "gate_proj"), {}, {}),
        ("hf_dinov3_gated", _named("hf_dinov3", "model.layer.", "gate_proj", qkv_bias=""), {},
         {"image_size": 56}),
        ("hf_siglip", _named("hf_clip", prefix="vision_model."), TEXT, {}),
        ("hf_clip_full", _named("openclip"), OPENCLIP_TEXT, OPENAI),
        ("hf_dinov2_reg", _named("timm", "register_tokens", chunk=2), MASK, {}),
        ("hf_dinov2_cls", _named("timm", "mlp.w12"), MASK, {"interpolation": "bicubic"}),
        ("hf_mae", _named("timm"), MAE, MAE_HF),
        ("hf_mae", _named("hf", prefix="vit."), HF_MAE, {}),
        ("npz_siglip_scan", _named("flax", "LayerNorm_1", prefix="params/img/", sizes={"heads": 3}),
         BIG_VISION_TEXT, {"activation": "gelu_tanh"}),
    ],
)  # fmt: skip
def test_other_names_of_the_same(case, naming, others, settings, tmp_path):
    """Names of transformers 5 in memory, of facebook, of OpenCLIP; parts nobody needs beside."""
    model, variables = load_pretrained(_weights(case))
    arrays = to_torch(naming, _flat(variables)) | others
    write_state_dict(tmp_path / "renamed.pth", arrays)
    again, back = load_pretrained(tmp_path / "renamed.pth", num_heads=3, **settings)
    assert again.clone(preprocessing=model.preprocessing) == model
    _same(back, variables)


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("npz")])
def test_a_bare_file_is_its_familys(case):
    """What the file alone cannot say has a default, and a keyword."""
    unsaid = {
        "timm_siglip_cls": {"activation": "gelu_tanh"},
        "timm_clip_quickgelu": {"activation": "quick_gelu"},
        "timm_dinov3_plus": {"pool": "token", "image_size": 56},
        "timm_dinov3": {"image_size": 64},
        "hf_dinov3_gated": {"image_size": 56},
    }
    model, variables = load_pretrained(_weights(case))
    file = GOLDENS / case / "model.safetensors"
    bare, same = load_pretrained(file, num_heads=3, **unsaid.get(case, {}))
    if case == "timm_dinov3_plus":
        assert bare.pool == "token"
        bare = bare.clone(pool=None)
    assert bare.clone(preprocessing=model.preprocessing) == model
    _same(variables, same)


def _arrays(case, scheme="timm", *forms):
    """A case's model under other names."""
    _, variables = load_pretrained(_weights(case))
    return to_torch(_named(scheme, *forms), _flat(variables))


def _load(tmp_path, arrays, **settings):
    save_file(arrays, tmp_path / "x.safetensors")
    return load_pretrained(tmp_path / "x.safetensors", **{"num_heads": 3, **settings})


class TestFamilies:
    def test_facebooks_dinov2_resamples_with_an_offset(self, tmp_path):
        arrays = _arrays("hf_dinov2_cls")
        plain, _ = _load(tmp_path, arrays)
        theirs, _ = _load(tmp_path, arrays | MASK)
        given, _ = _load(tmp_path, arrays | MASK, interpolation="bilinear")
        rules = [model.interpolation for model in (plain, theirs, given)]
        assert rules == ["bicubic_antialias", "bicubic_offset", "bilinear"]

    def test_the_callers_word_is_the_last(self):
        said = {"activation": "gelu", "layer_norm_eps": 1e-3, "pool": "avg"}
        model, variables = load_pretrained(GOLDENS / "timm_siglip_cls", **said)
        assert {name: getattr(model, name) for name in said} == said
        assert "attn_pool" not in variables["params"]

    def test_a_class_token_has_a_position_unless_the_grid_says_no(self, tmp_path):
        """4 x 6 patches and a class token are 25 rows, as 5 x 5 patches alone would be."""
        arrays = _arrays("hf_mae")
        arrays["pos_embed"] = arrays["pos_embed"][:, :25]
        asked, variables = _load(tmp_path, arrays, image_size=(32, 48))
        assert (asked.positions, asked.shape.grid) == ("all", (4, 6))
        np.testing.assert_array_equal(variables["params"]["pos_embed"], arrays["pos_embed"])
        square, _ = _load(tmp_path, arrays)
        assert (square.positions, square.shape.grid) == ("patches", (5, 5))

    def test_no_registers_are_an_empty_array(self, tmp_path):
        _, variables = load_pretrained(GOLDENS / "hf_dinov3_gated")
        naming = _named("hf_dinov3", "gate_proj", qkv_bias="")
        arrays = to_torch(naming, _flat(variables))
        arrays["embeddings.register_tokens"] = np.zeros((1, 0, 48), np.float32)
        assert _load(tmp_path, arrays)[0].num_registers == 0

    def test_positions_of_the_rotary_kinds(self):
        dinov3, _ = load_pretrained(GOLDENS / "timm_dinov3", image_size=(96, 64))
        assert (dinov3.rotary, dinov3.positions) == (Rotary(), "none")
        assert dinov3.image_size == (96, 64)
        eva02, _ = load_pretrained(GOLDENS / "timm_eva02")
        assert eva02.rotary == Rotary(10000.0, interleaved=True, reference_grid=16)
        assert (eva02.positions, eva02.qkv_bias) == ("all", "qv")

    @pytest.mark.parametrize("name", list_models("*_*"))
    def test_a_bare_file_of_each_published_model(self, name):
        """All but QuickGELU and two of SigLIP 2's tanh come from the shapes alone."""
        model = create_model(name)
        fields = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
        fields["pool"] = model.pool if model.pool == "map" or model.fc_norm else None
        naming = _named("timm", *(["q_bias"] if name.startswith("eva02") else []))
        known = defaults(naming, [], fields)
        told = ("num_heads", "layer_norm_eps", "rotary", "interpolation")
        assert {field: known[field] for field in told} == {f: getattr(model, f) for f in told}
        if "siglip_gap" not in name:
            assert known["pool"] == model.pool
        if not any(part in name for part in ("quickgelu", "siglip_gap", "siglip_512")):
            assert known["activation"] == model.activation


class TestTimmsNames:
    def _named(self, tmp_path, case, **config):
        shutil.copytree(GOLDENS / case, tmp_path / case)
        file = tmp_path / case / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        return load_pretrained(tmp_path / case)[0]

    def test_a_tag_is_dropped(self, tmp_path):
        name = "vit_base_patch16_clip_quickgelu_224.metaclip_2pt5b"
        model = self._named(tmp_path, "timm_clip_quickgelu", architecture=name)
        assert model.activation == "quick_gelu"

    def test_an_unknown_one_is_of_its_arrays_family(self, tmp_path):
        name = "vit_unheard_patch16_clip_224"
        model = self._named(tmp_path, "timm_clip_quickgelu", architecture=name)
        assert (model.activation, model.layer_norm_eps) == ("gelu", 1e-5)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"architecture": "vit_base_patch16_rope_224"}, "vit_base_patch16_rope_224: not supp"),
            ({"model_args": {"global_pool": "max"}}, "expected global_pool 'token'.*; got 'max'"),
            ({"model_args": {"act_layer": "relu6"}}, "unknown act_layer in .*config.json 'relu6'"),
            ({"model_args": [1]}, "expected model_args as an object"),
        ],
        ids=str,
    )
    def test_refusals(self, config, message, tmp_path):
        with pytest.raises(InputError, match=message) as error:
            self._named(tmp_path, "timm_deit3", **config)
        assert "\n" not in str(error.value)


class TestBadFiles:
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("dtype", [np.float32, np.float16])
    def test_no_numbers(self, value, dtype, tmp_path):
        arrays = {name: array.astype(dtype) for name, array in _arrays("hf_mae").items()}
        arrays["blocks.2.mlp.fc1.weight"][3, 4] = value
        with pytest.raises(InputError, match=r"NaN or infinite: blocks\.2\.mlp\.fc1\.weight$"):
            _load(tmp_path, arrays)

    @pytest.mark.parametrize("case", ["hf_dinov3_gated", "timm_eva02", "npz_siglip_scan"])
    def test_truncated(self, case, tmp_path):
        copy = tmp_path / case
        shutil.copytree(GOLDENS / case, copy)
        file = copy / ("weights.npz" if case.startswith("npz") else "model.safetensors")
        file.write_bytes(file.read_bytes()[:20000])
        with pytest.raises(InputError) as error:
            load_pretrained(file if case.startswith("npz") else copy)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("npz")])
    def test_one_array_less_or_more_or_of_another_shape(self, case, tmp_path):
        shutil.copytree(GOLDENS / case, tmp_path / case)
        file = tmp_path / case / "model.safetensors"
        arrays = load_file(file)
        ends = ("norm1.bias", "layernorm_before.bias")
        name = next(n for n in arrays if n.endswith(ends) and not n.startswith("text_model"))
        changes = {
            "missing": {k: v for k, v in arrays.items() if k != name},
            "left over": arrays | {"neck.weight": np.zeros(3, np.float32)},
            "misshapen": arrays | {name: np.zeros(7, np.float32)},
        }
        for misfit, changed in changes.items():
            save_file(changed, file)
            expected = "neck.weight" if misfit == "left over" else name
            with pytest.raises(InputError, match=f"{misfit}: {expected}") as error:
                load_pretrained(tmp_path / case)
            assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("case", "name"),
        [
            ("timm_dinov3_plus", "head.bias"),
            ("timm_dinov3_plus", "head.weight"),
            ("timm_dinov3_plus", "reg_token"),
            ("timm_dinov3_plus", "blocks.1.attn.q_bias"),
            ("hf_dinov2_reg", "embeddings.register_tokens"),
            ("hf_dinov2_reg", "embeddings.patch_embeddings.projection.bias"),
            ("hf_siglip", "head.probe"),
            ("hf_siglip2_naflex", "encoder.layers.0.self_attn.k_proj.bias"),
            ("npz_siglip_scan", "params/img/Transformer/encoderblock/LayerNorm_0/bias"),
            (
                "npz_siglip_scan",
                "params/img/Transformer/encoderblock/MultiHeadDotProductAttention_0/query/bias",
            ),
        ],
    )
    def test_what_is_missing_makes_no_other_model(self, case, name):
        checkpoint = read_raw_checkpoint(_weights(case))
        arrays = {other: array for other, array in checkpoint.arrays.items() if other != name}
        assert len(arrays) == len(checkpoint.arrays) - 1
        with pytest.raises(InputError, match=f"(missing:|without) {re.escape(name)}"):
            load_pretrained(dataclasses.replace(checkpoint, arrays=arrays))

    def test_a_classifier_that_reads_what_no_norm_has_seen(self, tmp_path):
        arrays = load_file(GOLDENS / "hf_clip_full" / "model.safetensors")
        arrays["classifier.weight"] = np.zeros((5, 48), np.float32)
        with pytest.raises(InputError, match="before the final norm; num_classes=0"):
            _load(tmp_path, arrays)


def test_arrays_are_read_one_by_one():
    """Nobody holds what a checkpoint has already given: a model costs its own size once."""
    alive, most = weakref.WeakSet(), 0

    class Array(np.ndarray):
        def __hash__(self):
            return id(self)

    class OneByOne(Mapping):
        def __init__(self, arrays):
            self._arrays = arrays

        def __getitem__(self, name):
            nonlocal most
            array = self._arrays[name].copy().view(Array)
            alive.add(array)
            most = max(most, len(alive))
            return array

        def __iter__(self):
            return iter(self._arrays)

        def __len__(self):
            return len(self._arrays)

    arrays = _arrays("hf_mae", "hf")
    checkpoint = RawCheckpoint("x", OneByOne(arrays))
    _, variables = load_pretrained(checkpoint, num_heads=3)
    assert most <= 4  # query, key and value, and one to compare
    _same(variables, load_pretrained(GOLDENS / "hf_mae")[1])
