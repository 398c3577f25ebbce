"""A name, a method and settings become a model, or one line that says which of them is wrong.

Covers models/preprocessing.py.
"""

import dataclasses

import pytest

import tdm_jax
from tdm_jax import Preprocessing, create_model, list_models, list_reducers, make_reducer
from tdm_jax.errors import InputError
from tdm_jax.models.registry import MODELS
from tdm_jax.models.rotary import Rotary
from tdm_jax.models.vit import VisionTransformer
from tdm_jax.reduction import Reducer, describe_reducer
from tdm_jax.reduction.registry import setting_names

SIZES = {
    "image_size": 16,
    "patch_size": 4,
    "width": 16,
    "depth": 3,
    "num_heads": 2,
    "num_classes": 3,
}


def test_every_public_name_is_there():
    for name in tdm_jax.__all__:
        assert getattr(tdm_jax, name) is not None, name


def test_lists():
    assert list_models() == sorted(name for name in MODELS if "." not in name)
    assert list_models("deit_*.*") == [f"{name}.fb_in1k" for name in list_models("deit_*")]
    assert list_models("DeiT_small*") == [
        "deit_small_distilled_patch16_224", "deit_small_patch16_224"
    ]  # fmt: skip
    assert list_models("resnet*") == []
    assert {"none", "tdm", "evit+tdm", "tome"} <= set(list_reducers())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_small_patch14_dinov1", r"'vit_small_patch14_dinov2'.*expected one of tdm_jax.list_m"),
        ("vit_huge_patch14_224.mea", "huge_patch14_224.mae'.*: vit_huge_patch14_224.mae, vit_huge"),
        ("vit_so400m_patch14_siglip_384", "did you mean.*'vit_so400m_patch14_siglip_378'"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(InputError, match=message) as error:
        create_model(name)
    assert len(str(error.value)) < 300


def test_settings_over_a_published_name():
    model = create_model("vit_small_patch14_reg4_dinov2", image_size=(168, 224), num_classes=10)
    assert (model.shape.grid, model.num_classes, model.layer_scale) == ((12, 16), 10, True)


def test_rotary_from_its_description():
    sizes = {**SIZES, "num_heads": 2, "positions": "none"}
    rotary = Rotary(50.0, interleaved=True)
    model = create_model("vit", **sizes, rotary=rotary.describe())
    assert model == create_model("vit", **sizes, rotary=rotary)
    with pytest.raises(InputError, match="rotary"):
        create_model("vit", **sizes, rotary={"base": 100.0})


@pytest.mark.parametrize("name", list_reducers())
def test_no_setting_is_of_the_model_and_of_the_method(name):
    fields = {field.name for field in dataclasses.fields(VisionTransformer)}
    assert not fields & setting_names(name)


def test_settings_of_both_in_one_call():
    model = create_model(
        "vit", "tdm", 0.5, **SIZES, drop_path=0.1, layers=(1,), preset="default", weight="uniform"
    )
    assert model.drop_path == 0.1
    assert model.reducer == make_reducer(
        "tdm", keep_rate=0.5, layers=(1,), preset="default", weight="uniform"
    )
    assert create_model("vit", "tome", r=2, **SIZES).reducer == make_reducer("tome", r=2)
    moved = dict(grouping="agglomeration", linkage="single", layers=(1,))
    assert create_model("vit", "tome", **SIZES, **moved).reducer == make_reducer("tome", **moved)


def test_none_is_the_default_everywhere():
    """Defect I: `layers=None` was a TypeError, `mlp_ratio=None` a traceback from flax."""
    fields = ("mlp_ratio", "num_registers", "dtype", "preprocessing", "layer_norm_eps")
    nothing = dict.fromkeys((*fields, "layers", "counts", "r", "round_to"))
    sizes = SIZES | {"depth": 12}
    model = create_model("vit", "topk", None, **sizes, **nothing)
    assert model == create_model("vit", "topk", **sizes)
    assert create_model("deit_tiny_patch16_224", num_classes=None).num_classes == 1000


@pytest.mark.parametrize(
    ("reducer", "settings", "message"),
    [
        ("none", {"drop_pat": 0.1}, "unknown setting 'drop_pat'; did you mean 'drop_path'"),
        ("tdm", {"pre_set": "default"}, "did you mean 'preset'"),
        ("tdm", {"layer": None}, "did you mean 'layers'"),
        ("none", {"layers": (1,)}, "unknown setting 'layers'"),
        ("tdn", {}, "unknown reducer 'tdn'; did you mean 'tdm'"),
        ("none", {"num_heads": 3}, "num_heads must divide the width 16"),
        ("none", {"patch_size": None}, "needs a value for: patch_size"),
        (make_reducer("tome"), {"layers": (1,)}, r"layers belong to the reducer.*make_reducer\(\)"),
        (make_reducer("tome"), {"keep_rate": 0.5}, "keep_rate belong to the reducer"),
        ({"name": "tone"}, {}, "unknown reducer 'tone'"),
        ({}, {}, "unknown reducer"),
        ("none", {"keep_rate": 0.5}, "keep_rate"),
    ],
    ids=str,
)
def test_refusals(reducer, settings, message):
    with pytest.raises(InputError, match=message) as error:
        create_model("vit", reducer, **SIZES | settings)
    assert "\n" not in str(error.value)


def test_a_described_reducer_is_changed_by_settings():
    described = describe_reducer(make_reducer("tdm", keep_rate=0.7, layers=(1, 2)))
    same = create_model("vit", described, **SIZES).reducer
    assert same == make_reducer("tdm", keep_rate=0.7, layers=(1, 2))
    changed = create_model("vit", described, 0.5, layers=(0, 1), **SIZES).reducer
    assert changed == make_reducer("tdm", keep_rate=0.5, layers=(0, 1))
    # Counts were for the keep rate that they were found at.
    calibrated = describe_reducer(make_reducer("ats", layers=(0, 1), counts=(9, 5)))
    changed = create_model("vit", calibrated, 0.5, **SIZES).reducer
    assert changed == make_reducer("ats", layers=(0, 1), keep_rate=0.5)


def test_unreduced_is_one_thing():
    for reducer, keep_rate in (("none", None), ("none", 1.0), (Reducer(), None)):
        assert create_model("vit", reducer, keep_rate, **SIZES).reducer == Reducer()


class TestPreprocessing:
    def test_as_published(self):
        small = create_model("deit_small_patch16_224").preprocessing
        assert small == Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 0.875)
        assert small.interpolation == "bicubic"
        assert create_model("deit_base_distilled_patch16_384").preprocessing.crop_pct == 1.0
        assert create_model("vit", **SIZES).preprocessing is None

    def test_grey_images_have_another(self):
        assert create_model("deit_tiny_patch16_224", in_channels=1).preprocessing is None
        grey = Preprocessing(mean=(0.5,), std=(0.5,))
        model = create_model("deit_tiny_patch16_224", in_channels=1, preprocessing=grey)
        assert model.preprocessing is grey

    def test_from_its_description(self):
        prepared = Preprocessing((0.5,) * 3, (0.25,) * 3, 0.9, "bilinear")
        model = create_model("vit", **SIZES, preprocessing=prepared.describe())
        assert model.preprocessing == prepared
        assert hash(model) == hash(create_model("vit", **SIZES, preprocessing=prepared))
        whole = create_model("vit", **SIZES, preprocessing={"crop_pct": 1, "mean": [0, 0, 0]})
        assert whole.preprocessing == Preprocessing((0.0,) * 3, crop_pct=1.0)

    @pytest.mark.parametrize(
        ("description", "message"),
        [
            ({"mean": [0.5], "std": [0.5]}, r"each of the 3 channels; got \(0.5,\)"),
            ({"mean": [0.5]}, "a mean and a positive std for each channel"),
            ({"std": [0, 1, 1]}, "a positive std"),
            ({"crop_pct": 1.2}, r"crop_pct must be in \(0, 1\]"),
            ({"interpolation": "cubic"}, "did you mean 'bicubic'"),
            ({"crop": 0.9}, "preprocessing: got.*crop"),
            ({"mean": 0.5}, "preprocessing: got"),
            ({"mean": ["a", "b", "c"]}, "preprocessing: got"),
        ],
        ids=str,
    )
    def test_refusals(self, description, message):
        with pytest.raises(InputError, match=message):
            create_model("vit", **SIZES, preprocessing=description)
