"""Published vision transformers by timm's names, with what each tag's weights were prepared for.

A name is its parts: `vit_base_patch16_clip_224` is of base size, cuts patches of 16 pixels, has
CLIP's norms and reads 224 pixels. A tag (`vit_base_patch16_clip_224.openai`) names weights: it says
how their images are prepared and how many outputs they have. All as of timm 1.0.31, but for two
things. DeiT is cut out as its authors do (0.875 of the side, 0.9 there). And a CLIP name without a
tag is the image tower that CLIP, OpenCLIP or their followers trained, whose outputs are the
projection (512 for base, 768, 1024 and 1280 for large, huge and gigantic); in timm most such names
mean a classifier tuned on ImageNet.
"""

import itertools
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from tdm_jax.models.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from tdm_jax.models.rotary import Rotary

_IMAGENET = (IMAGENET_MEAN, IMAGENET_STD)
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_SATELLITE = ((0.43, 0.411, 0.296), (0.213, 0.156, 0.143))


def _size(width: int, depth: int, num_heads: int, hidden: int | None = None) -> dict[str, Any]:
    sizes = {"width": width, "depth": depth, "num_heads": num_heads}
    return sizes if hidden is None else {**sizes, "mlp_ratio": hidden / width}


_SWIGLU = {"gated_mlp": True, "activation": "silu"}

# What the parts of a name say, as regular expressions; of two that say the same the later holds.
_PARTS: dict[str, dict[str, Any]] = {
    "_tiny_": _size(192, 12, 3),
    "_xsmall_": _size(256, 10, 4),
    "_small_": _size(384, 12, 6),
    "_medium_": _size(512, 12, 8),
    "_betwixt_": _size(640, 12, 10),
    "_base_": _size(768, 12, 12),
    "_large_": _size(1024, 24, 16),
    "_so400m_": _size(1152, 27, 16, hidden=4304),
    "_huge_": _size(1280, 32, 16),
    "_huge_plus_": _size(1280, 32, 20),
    "_giant_.*clip": _size(1408, 40, 16, hidden=6144),
    "_giant_.*dinov2": _size(1536, 40, 24, hidden=4096) | _SWIGLU,
    "_giantopt_": _size(1536, 40, 16),
    "_gigantic_": _size(1664, 48, 16, hidden=8192),
    "_7b_": _size(4096, 40, 32, hidden=8192),
    "_distilled_": {"distilled": True},
    "^deit3_": {"layer_scale": True, "positions": "patches"},
    "_dinov2": {"image_size": (518, 518), "num_classes": 0, "layer_scale": True},
    "_reg4_": {"num_registers": 4, "positions": "patches"},
    "_dinov3": {
        "image_size": (256, 256),
        "num_classes": 0,
        "num_registers": 4,
        "layer_scale": True,
        "layer_norm_eps": 1e-5,
        "qkv_bias": "",
        "positions": "none",
        "rotary": Rotary(),
        "pool": "avg",
    },
    "_(small_plus|huge_plus|7b)_": _SWIGLU,
    "_qkvb": {"qkv_bias": "qv"},
    "^eva02_": {
        "mlp_ratio": 8 / 3,
        "qkv_bias": "qv",
        "rotary": Rotary(10000.0, interleaved=True, reference_grid=16),
        "pool": "avg",
        "fc_norm": True,
        **_SWIGLU,
    },
    "^eva02_(base|large)": {"mlp_norm": True},
    "^eva02_large": {"mlp_ratio": 2730 / 1024},
    "_siglip_": {"class_token": False, "num_classes": 0, "pool": "map"},
    "_siglip_gap_": {"pool": "avg"},
    "_patch32_siglip|_so400m_patch16_|_giantopt_|_large_patch16_siglip.*_512": {
        "activation": "gelu_tanh"
    },
    "_clip_": {"pre_norm": True, "patch_bias": False, "layer_norm_eps": 1e-5, "num_classes": 512},
    "_large_.*_clip_": {"num_classes": 768},
    "_(huge|giant)_.*_clip_": {"num_classes": 1024},
    "_gigantic_.*_clip_": {"num_classes": 1280},
    "_plus_clip_": {**_size(896, 12, 14), "num_classes": 640},
    "_quickgelu_": {"activation": "quick_gelu"},
}


class _Release(NamedTuple):
    """Weights under a tag.

    Attributes:
      tags: of which all that follows holds.
      names: as a shell would expand them.
      colours: mean and std.
      crop_pct: None for 0.9 at 224 pixels, 1 at more.
      num_classes: None for what the name says.
    """

    tags: str
    names: str
    colours: tuple[tuple[float, ...], tuple[float, ...]]
    crop_pct: float | None = None
    num_classes: int | None = None


_AUGREG = "vit_{tiny,small,base,large}_patch16_224 vit_{small,base}_patch32_224 vit_base_patch8_224"
_AUGREG_384 = "vit_{tiny,small,base,large}_patch16_384 vit_{small,base}_patch32_384"
_DEIT3 = "deit3_{small,base,large}_patch16_{224,384} deit3_{medium_patch16,huge_patch14}_224"
_SIGLIP = "vit_base_patch16_S_{224,256,384,512} vit_large_patch16_S_{256,384} "
_SIGLIP2 = (
    "vit_large_patch16_S_512 vit_so400m_patch14_S_{224,378} vit_so400m_patch16_S_{256,384,512} "
    "vit_base_patch32_S_256 vit_giantopt_patch16_S_{256,384} "
)

# A name without a tag has the first tag that has the name.
_RELEASES = (
    _Release("fb_in1k", "deit_{tiny,small,base}{,_distilled}_patch16_224", _IMAGENET, 0.875),
    _Release("fb_in1k", "deit_base{,_distilled}_patch16_384", _IMAGENET),
    _Release("fb_in1k", _DEIT3, _IMAGENET),
    _Release("fb_in22k_ft_in1k", _DEIT3, _IMAGENET, 1.0),
    _Release("augreg2_in21k_ft_in1k", "vit_base_patch{8,16}_224", _HALF),
    _Release("augreg_in21k_ft_in1k", f"{_AUGREG} {_AUGREG_384}", _HALF),
    _Release("augreg_in21k", _AUGREG, _HALF, num_classes=21843),
    _Release("augreg_in1k", "vit_{small,base}_patch16_{224,384} vit_base_patch32_{224,384}", _HALF),
    _Release("sam_in1k", "vit_base_patch{16,32}_224", _HALF),
    _Release("orig_in21k_ft_in1k", "vit_base_patch16_{224,384} vit_large_patch32_384", _HALF),
    _Release(
        "orig_in21k",
        "vit_{base,large}_patch{16,32}_224 vit_huge_patch14_224",
        _HALF,
        num_classes=0,
    ),
    _Release("mae", "vit_{base,large}_patch16_224 vit_huge_patch14_224", _IMAGENET, num_classes=0),
    _Release("dino", "vit_{small,base}_patch{8,16}_224", _IMAGENET, num_classes=0),
    _Release("lvd142m", "vit_{small,base,large,giant}_patch14_{,reg4_}dinov2", _IMAGENET),
    _Release(
        "lvd1689m",
        "vit_{small,small_plus,base,large,huge_plus}_patch16_dinov3{,_qkvb} vit_7b_patch16_dinov3",
        _IMAGENET,
    ),
    _Release("eupe_lvd1689m", "vit_{tiny,small,base}_patch16_dinov3_qkvb", _IMAGENET),
    _Release("sat493m", "vit_large_patch16_dinov3{,_qkvb} vit_7b_patch16_dinov3", _SATELLITE),
    _Release("mim_in22k", "eva02_{tiny,small,base,large}_patch14_224", _CLIP, num_classes=0),
    _Release("mim_m38m", "eva02_large_patch14_224", _CLIP, num_classes=0),
    _Release("mim_in22k_ft_in22k_in1k mim_in22k_ft_in1k", "eva02_{base,large}_patch14_448", _CLIP),
    _Release("mim_in22k_ft_in1k", "eva02_{tiny,small}_patch14_336", _CLIP),
    _Release("mim_m38m_ft_in22k_in1k mim_m38m_ft_in1k", "eva02_large_patch14_448", _CLIP),
    _Release("v2_webli", (_SIGLIP + _SIGLIP2).replace("S", "siglip{,_gap}"), _HALF, 0.9),
    _Release("webli", _SIGLIP.replace("S", "siglip{,_gap}"), _HALF, 0.9),
    _Release("webli", "vit_so400m_patch14_siglip_{224,378,gap_224}", _HALF, 0.9),
    _Release("webli", "vit_so400m_patch14_siglip_gap_378", _HALF),
    _Release("webli_i18n", "vit_{base,so400m}_patch16_siglip{,_gap}_256", _HALF, 0.9),
    _Release(
        "pali_pt pali2_3b_pt pali2_10b_pt", "vit_so400m_patch14_siglip_gap_{224,448,896}", _HALF
    ),
    _Release("pali_mix", "vit_so400m_patch14_siglip_gap_{224,448}", _HALF),
    _Release("laion2b", "vit_base_patch32_clip_224", _CLIP, 0.9),
    _Release("laion2b", "vit_large_patch14_clip_224", _HALF, 1.0),
    _Release(
        "laion2b",
        "vit_base_patch16_clip_224 vit_{huge,giant,gigantic}_patch14_clip_224",
        _CLIP,
        1.0,
    ),
    _Release("openai", "vit_base_patch{16,32}_clip_{,quickgelu_}224", _CLIP, 0.9),
    _Release("openai", "vit_large_patch14_clip_{,quickgelu_}{224,336}", _CLIP, 1.0),
    _Release("laion400m_e32", "vit_base_patch32_clip_{,quickgelu_}224", _CLIP, 0.9),
    _Release(
        "laion400m_e32",
        "vit_{base_patch16,large_patch14}_clip_224 vit_base_patch16_plus_clip_240",
        _CLIP,
        1.0,
    ),
    _Release(
        "datacompxl",
        "vit_{base_patch32,base_patch16,large_patch14}_clip_224 vit_base_patch32_clip_256",
        _CLIP,
        1.0,
    ),
    _Release(
        "dfn2b", "vit_base_patch16_clip_224 vit_large_patch14_clip_{,quickgelu_}224", _CLIP, 1.0
    ),
    _Release("dfn5b", "vit_huge_patch14_clip_{,quickgelu_}{224,378}", _CLIP, 1.0),
    _Release(
        "metaclip_400m metaclip_2pt5b",
        "vit_{base_patch32,base_patch16,large_patch14}_clip_{,quickgelu_}224",
        _CLIP,
        1.0,
    ),
    _Release("metaclip_2pt5b", "vit_{huge,gigantic}_patch14_clip_{,quickgelu_}224", _CLIP, 1.0),
    _Release("metaclip2_worldwide", "vit_{huge,gigantic}_patch14_clip_{224,378}", _CLIP, 1.0),
    _Release("metaclip2_worldwide", "vit_huge_patch14_clip_quickgelu_224", _CLIP, 1.0),
    _Release("tinyclip_yfcc15m", "vit_{xsmall,medium}_patch16_clip_224", _CLIP),
    _Release("tinyclip_laion400m", "vit_{medium,betwixt}_patch32_clip_224", _CLIP),
    # Classifiers tuned on ImageNet: of CLIP's sizes at more pixels there is nothing else.
    _Release(
        "laion2b_ft_in12k_in1k",
        "vit_base_patch{16,32}_clip_384 vit_base_patch32_clip_448 vit_huge_patch14_clip_{224,336}",
        _CLIP,
        1.0,
        1000,
    ),
    _Release("laion2b_ft_in12k_in1k", "vit_large_patch14_clip_{224,336}", _HALF, 1.0, 1000),
    _Release("laion2b_ft_in12k_in1k", "vit_base_patch16_clip_224", _CLIP, 0.95, 1000),
    _Release("laion2b_ft_in12k_in1k", "vit_base_patch32_clip_224", _CLIP, 0.9, 1000),
)


def expand(names: str) -> Iterator[str]:
    """The words that `vit_{small,base}_patch16_224` is short for, as in a shell."""
    for word in names.split():
        parts = re.split(r"\{(.*?)\}", word)  # the odd ones were in braces
        yield from map("".join, itertools.product(*(part.split(",") for part in parts)))


def _fields(name: str) -> dict[str, Any]:
    """What a name without a tag says of a `VisionTransformer`."""
    fields: dict[str, Any] = {"num_classes": 1000}
    for part, said in _PARTS.items():
        if re.search(part, name):
            fields |= said
    fields["patch_size"] = int(re.findall(r"_patch(\d+)_", name)[0])
    if pixels := re.findall(r"_(\d+)$", name):
        fields["image_size"] = (int(pixels[0]), int(pixels[0]))
    return fields


def _published() -> dict[str, dict[str, Any]]:
    models: dict[str, dict[str, Any]] = {}
    for release in _RELEASES:
        for name in expand(release.names):
            fields = _fields(name)
            if release.num_classes is not None:
                fields["num_classes"] = release.num_classes
            crop_pct = release.crop_pct or (0.9 if fields["image_size"][0] == 224 else 1.0)
            fields["preprocessing"] = Preprocessing(*release.colours, crop_pct)
            models.setdefault(name, fields)
            models |= {f"{name}.{tag}": fields for tag in release.tags.split()}
    return models


PUBLISHED = _published()
