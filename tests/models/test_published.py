"""The table of published names against what timm 1.0.31 builds and says of each; its document."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import tdm_jax
from tdm_jax import create_model, list_models
from tdm_jax.models.published import PUBLISHED, expand
from tdm_jax.models.rotary import Rotary
from tdm_jax.models.vit import VisionTransformer, parameter_count

ROOT = Path(__file__).parents[2]
FACTS = json.loads((ROOT / "tests/goldens/backbones/published.json").read_text())
TIMM = FACTS["models"]
# 384 pixels are no multiple of 14: timm leaves the last 6 out. The same weights are "_378".
UNEVEN = {"vit_so400m_patch14_siglip_384", "vit_so400m_patch14_siglip_gap_384"}
NAMES = sorted(TIMM.keys() - UNEVEN)


def test_the_names_are_timms():
    assert list_models() == sorted([*NAMES, "vit"])
    assert set(list_models("*.*")) < {
        f"{name}.{tag}" for name in TIMM for tag in TIMM[name]["tags"]
    }
    assert list_models("*dinov2*") == sorted(
        expand("vit_{small,base,large,giant}_patch14_{,reg4_}dinov2")
    )


def positions(rows: int | None, model: VisionTransformer) -> str:
    if rows is None:
        return "none"
    patches = model.shape.grid[0] * model.shape.grid[1]
    return {patches: "patches", patches + model.shape.prefix: "all"}[rows]


@pytest.mark.parametrize("name", NAMES)
def test_fields(name):
    facts, model = TIMM[name], create_model(name)
    assert model.image_size == (facts["image"], facts["image"])
    assert model.patch_size == facts["patch"]
    assert (model.width, model.depth, model.num_heads) == (
        facts["width"], facts["depth"], facts["heads"]
    )  # fmt: skip
    assert model.mlp_hidden == facts["fc2"]
    assert facts["fc1"] == facts["fc2"] * (2 if model.gated_mlp else 1)
    assert model.activation == facts["act"]
    assert (model.class_token, model.distilled) == (facts["cls"], facts["dist"])
    assert model.num_registers == facts["reg"]
    if model.class_token:
        assert model.positions == positions(facts["pos"], model)
    assert model.layer_norm_eps == facts["eps"]
    norms = ["norm_pre"] * model.pre_norm + ["fc_norm" if model.fc_norm else "norm"]
    assert norms == facts["norms"]
    assert model.pooling == facts["pool"]
    for field in ("mlp_norm", "layer_scale", "patch_bias", "qkv_bias"):
        assert getattr(model, field) == facts[field], field
    assert model.rotary == (facts["rope"] and Rotary(*facts["rope"]))


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_tags(name):
    architecture, _, tag = name.partition(".")
    model = create_model(name)
    if tag:
        prepared = TIMM[architecture]["tags"][tag]
    else:
        # Without a tag a CLIP name is CLIP's tower; timm's default is often tuned on ImageNet.
        default = TIMM[architecture]["tags"][TIMM[architecture]["tag"]]
        releases = [known for known in PUBLISHED if known.startswith(f"{name}.")]
        prepared = TIMM[architecture]["tags"][releases[0].partition(".")[2]]
        assert prepared == default or "_clip_" in name
    colours, crop_pct, num_classes = prepared
    if architecture.startswith("deit_") and model.image_size == (224, 224):
        crop_pct = 0.875  # DeiT's own; timm's is 0.9
    assert model.num_classes == num_classes
    assert model.preprocessing.describe() == {
        "mean": FACTS["colours"][colours][0],
        "std": FACTS["colours"][colours][1],
        "crop_pct": crop_pct,
        "interpolation": "bicubic",
    }


def test_a_tag_changes_no_architecture():
    changed = {"preprocessing": None, "num_classes": 0}
    for name, fields in PUBLISHED.items():
        architecture = PUBLISHED[name.partition(".")[0]]
        assert fields | changed == architecture | changed, name


@pytest.mark.parametrize(
    "name",
    [
        "deit_tiny_distilled_patch16_224",
        "deit3_small_patch16_384",
        "vit_tiny_patch16_384",
        "vit_small_patch14_dinov2",
        "vit_small_patch14_reg4_dinov2",
        "vit_small_patch16_dinov3",
        "vit_small_plus_patch16_dinov3_qkvb",
        "eva02_tiny_patch14_336",
        "eva02_base_patch14_224",
        "vit_base_patch16_siglip_256",
        "vit_base_patch32_siglip_gap_256",
        "vit_base_patch32_clip_quickgelu_224",
    ],
)
def test_parameters(name):
    """Of one or two of a family; the larger ones differ in fields that are compared above."""
    model = create_model(name)
    images = jnp.zeros((1, *model.image_size, 3))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), images))["params"]
    body = {key: value for key, value in params.items() if not key.startswith("head")}
    assert parameter_count(body) == TIMM[name]["body"]
    assert ("head" in params) == (model.num_classes > 0)


def test_the_document():
    text = (ROOT / "docs" / "backbones.md").read_text()
    table = text[text.index("| family") : text.index("`num_classes=0`")]
    named = [name for short in re.findall(r"`(.*?)`", table) for name in expand(short)]
    assert sorted(named) == NAMES
    tagged = re.findall(r"\btimm/(\w+\.\w+)", text)
    assert len(tagged) > 5 and set(tagged) <= PUBLISHED.keys()
    (block,) = re.findall(r"```python\n(tdm_jax.list.*?)```", text, re.DOTALL)
    exec(compile(block, "backbones.md", "exec"), {"tdm_jax": tdm_jax})
