"""Where each program keeps our parameters: one table of names per scheme.

Our names are timm's as a tree (`blocks.3.attn.qkv` is `blocks_3/attn/qkv`). A file's own habits are
`forms`: each is a part of a name that tells it, with the entries that it changes.
"""

from typing import Literal, NamedTuple

from tdm_jax.checkpoint import layouts
from tdm_jax.checkpoint.layouts import Layouts

Scheme = Literal["timm", "hf", "hf_dinov3", "hf_clip", "openclip", "flax"]

# Our modules and single parameters, in the layout of timm's file; {i} is the block.
TREE: dict[str, Layouts] = {
    **dict.fromkeys(("cls_token", "dist_token", "reg_token", "pos_embed"), layouts.TOKENS),
    "patch_embed/proj": layouts.CONV,
    "norm_pre": layouts.NORM,
    "blocks_{i}/norm1": layouts.NORM,
    "blocks_{i}/attn/qkv": layouts.DENSE,
    "blocks_{i}/attn/proj": layouts.DENSE,
    "blocks_{i}/ls1/gamma": layouts.VECTOR,
    "blocks_{i}/norm2": layouts.NORM,
    "blocks_{i}/mlp/fc1": layouts.DENSE,
    "blocks_{i}/mlp/norm": layouts.NORM,
    "blocks_{i}/mlp/fc2": layouts.DENSE,
    "blocks_{i}/ls2/gamma": layouts.VECTOR,
    "norm": layouts.NORM,
    "attn_pool/latent": layouts.TOKENS,
    **dict.fromkeys(("attn_pool/q", "attn_pool/kv", "attn_pool/proj"), layouts.DENSE),
    "attn_pool/norm": layouts.NORM,
    **dict.fromkeys(("attn_pool/mlp/fc1", "attn_pool/mlp/fc2"), layouts.DENSE),
    "fc_norm": layouts.NORM,
    "head": layouts.DENSE,
    "head_dist": layouts.DENSE,
}  # fmt: skip


class At(NamedTuple):
    """Where a file has one of our modules.

    Attributes:
      names: {p} is what stands before every name, {b} the block; "*" is "weight", "bias", ... and
        is put at the end where it is not said. Several are stacked in this order. What stands in
        every block by a name without a number is there once for all, stacked over the blocks.
      layouts: None for those of `TREE`.
      rows: (first, end, all): a part of what stands there.
    """

    names: tuple[str, ...]
    layouts: Layouts | None = None
    rows: tuple[int, int, int] | None = None


def _at(name: str, layouts: Layouts | None = None, rows: tuple[int, int, int] | None = None) -> At:
    return At((name,), layouts, rows)


def _each(pattern: str, *parts: str) -> At:
    return At(tuple(pattern.replace("?", part) for part in parts))


def _heads(pattern: str, *parts: str) -> At:
    return _each(pattern, *parts)._replace(layouts=layouts.TO_HEADS)


def _timms(path: str) -> str:
    _, block, end = path.rpartition("blocks_{i}/")
    return ("{b}" if block else "{p}") + end.replace("/", ".")


Table = dict[str, At]
_MAP = "{p}MAPHead_0/MultiHeadDotProductAttention_0/"
_FIRST, _REST = (0, 1, 3), (1, 3, 3)  # of query, key and value in one array
_QKV, _FC1, _FC2 = "blocks_{i}/attn/qkv", "blocks_{i}/mlp/fc1", "blocks_{i}/mlp/fc2"
_PROJ, _NORM1, _NORM2 = "blocks_{i}/attn/proj", "blocks_{i}/norm1", "blocks_{i}/norm2"
_LS1, _LS2 = "blocks_{i}/ls1/gamma", "blocks_{i}/ls2/gamma"
_HEADS = {"head": _at("classifier")}
_LAMBDAS = {_LS1: _at("{b}layer_scale1.lambda1"), _LS2: _at("{b}layer_scale2.lambda1")}
_NORMS = {_NORM1: _at("{b}norm1"), _NORM2: _at("{b}norm2")}
_MLP = {_FC1: _at("{b}mlp.fc1"), _FC2: _at("{b}mlp.fc2")}
_GATED = {_FC1: _each("{b}mlp.?_proj", "gate", "up"), _FC2: _at("{b}mlp.down_proj")}
_PROJECTIONS = {
    _QKV: _each("{b}attention.?_proj", "q", "k", "v"),
    _PROJ: _at("{b}attention.o_proj"),
}
_TOKENS = {
    "cls_token": _at("{p}embeddings.cls_token"),
    "dist_token": _at("{p}embeddings.distillation_token"),
    "reg_token": _at("{p}embeddings.register_tokens"),
}

# Scheme -> form -> entries; "" is what every file of the scheme has, and later forms win. "{b}" is
# how the names of a block begin.
TABLES: dict[Scheme, dict[str, Table]] = {
    "timm": {
        "": {
            "{b}": _at("{p}blocks.{i}."),
            **{path: _at(_timms(path)) for path in TREE},
        },
        # EVA-02 and DINOv3.
        "gamma_1": {_LS1: _at("{b}gamma_1"), _LS2: _at("{b}gamma_2")},
        "q_bias": {f"{_QKV}/bias": _each("{b}attn.?_bias", "q", "k", "v")},
        "attn.q_proj": {_QKV: _each("{b}attn.?_proj", "q", "k", "v")},
        "mlp.fc1_g": {_FC1: _each("{b}mlp.fc1_?", "g", "x")},
        # Facebook's DINOv2.
        "register_tokens": {"reg_token": _at("{p}register_tokens")},
        "mlp.w12": {_FC1: _at("{b}mlp.w12"), _FC2: _at("{b}mlp.w3")},
    },
    # ViT, DeiT, MAE, DINOv2 of Hugging Face.
    "hf": {
        "": {
            "{b}": _at("{p}encoder.layer.{i}."),
            **_TOKENS,
            "pos_embed": _at("{p}embeddings.position_embeddings"),
            "patch_embed/proj": _at("{p}embeddings.patch_embeddings.projection"),
            _NORM1: _at("{b}layernorm_before"),
            _QKV: _each("{b}attention.attention.?", "query", "key", "value"),
            _PROJ: _at("{b}attention.output.dense"),
            _NORM2: _at("{b}layernorm_after"),
            _FC1: _at("{b}intermediate.dense"),
            _FC2: _at("{b}output.dense"),
            "norm": _at("{p}layernorm"),
            **_HEADS,
        },
        "cls_classifier": {
            "head": _at("cls_classifier"),
            "head_dist": _at("distillation_classifier"),
        },
        # As a model of transformers 5 or later has it in memory; on disk they keep the older names.
        "q_proj": {"{b}": _at("{p}layers.{i}."), **_PROJECTIONS, **_MLP},
        "layer_scale1": {"{b}": _at("{p}encoder.layer.{i}."), **_NORMS, **_LAMBDAS, **_MLP},
        "weights_in": {_FC1: _at("{b}mlp.weights_in"), _FC2: _at("{b}mlp.weights_out")},
        "gate_proj": _GATED,
    },
    "hf_dinov3": {
        "": {
            "{b}": _at("{p}layer.{i}."),
            **_TOKENS,
            "patch_embed/proj": _at("{p}embeddings.patch_embeddings"),
            **_NORMS,
            **_LAMBDAS,
            **_PROJECTIONS,
            _FC1: _at("{b}mlp.up_proj"),
            _FC2: _at("{b}mlp.down_proj"),
            "norm": _at("{p}norm"),
            **_HEADS,
        },
        "model.layer.": {"{b}": _at("{p}model.layer.{i}.")},  # in memory
        "gate_proj": _GATED,
    },
    # CLIP, SigLIP, SigLIP 2 of Hugging Face.
    "hf_clip": {
        "": {
            "{b}": _at("{p}encoder.layers.{i}."),
            "cls_token": _at("{p}embeddings.class_embedding", layouts=layouts.TOKEN),
            "pos_embed": _at("{p}embeddings.position_embedding.weight", layouts=layouts.TABLE),
            "patch_embed/proj": _at("{p}embeddings.patch_embedding"),
            "norm_pre": _at("{p}pre_layrnorm"),
            _NORM1: _at("{b}layer_norm1"),
            _QKV: _each("{b}self_attn.?_proj", "q", "k", "v"),
            _PROJ: _at("{b}self_attn.out_proj"),
            _NORM2: _at("{b}layer_norm2"),
            **_MLP,
            "norm": _at("{p}post_layernorm"),
            "attn_pool/latent": _at("{p}head.probe"),
            "attn_pool/q": _at("{p}head.attention.in_proj_*", rows=_FIRST),
            "attn_pool/kv": _at("{p}head.attention.in_proj_*", rows=_REST),
            "attn_pool/proj": _at("{p}head.attention.out_proj"),
            "attn_pool/norm": _at("{p}head.layernorm"),
            "attn_pool/mlp/fc1": _at("{p}head.mlp.fc1"),
            "attn_pool/mlp/fc2": _at("{p}head.mlp.fc2"),
            "head": _at("visual_projection"),
        },
        "classifier": _HEADS,
        "naflex": {
            "patch_embed/proj": _at("{p}embeddings.patch_embedding", layouts=layouts.PATCHES)
        },
    },
    "openclip": {
        "": {
            "{b}": _at("{p}visual.transformer.resblocks.{i}."),
            "cls_token": _at("{p}visual.class_embedding", layouts=layouts.TOKEN),
            "pos_embed": _at("{p}visual.positional_embedding", layouts=layouts.TABLE),
            "patch_embed/proj": _at("{p}visual.conv1"),
            "norm_pre": _at("{p}visual.ln_pre"),
            _NORM1: _at("{b}ln_1"),
            _QKV: _at("{b}attn.in_proj_*"),
            _PROJ: _at("{b}attn.out_proj"),
            _LS1: _at("{b}ls_1.gamma"),
            _NORM2: _at("{b}ln_2"),
            _FC1: _at("{b}mlp.c_fc"),
            _FC2: _at("{b}mlp.c_proj"),
            _LS2: _at("{b}ls_2.gamma"),
            "norm": _at("{p}visual.ln_post"),
            "head/kernel": _at("{p}visual.proj", layouts=layouts.MATRIX),
        },
    },
    # AugReg's .npz, and big_vision's (SigLIP among them).
    "flax": {
        "": {
            "{b}": _at("{p}Transformer/encoderblock_{i}/"),
            "cls_token": _at("{p}cls"),
            "pos_embed": _at("{p}Transformer/posembed_input/pos_embedding"),
            "patch_embed/proj": _at("{p}embedding", layouts=layouts.FLAX_CONV),
            _NORM1: _at("{b}LayerNorm_0"),
            _QKV: _heads("{b}MultiHeadDotProductAttention_1/?", "query", "key", "value"),
            _PROJ: _at("{b}MultiHeadDotProductAttention_1/out", layouts=layouts.FROM_HEADS),
            _NORM2: _at("{b}LayerNorm_2"),
            _FC1: _at("{b}MlpBlock_3/Dense_0", layouts=layouts.FLAX_DENSE),
            _FC2: _at("{b}MlpBlock_3/Dense_1", layouts=layouts.FLAX_DENSE),
            "norm": _at("{p}Transformer/encoder_norm"),
            "attn_pool/latent": _at("{p}MAPHead_0/probe"),
            "attn_pool/q": _heads(_MAP + "?", "query"),
            "attn_pool/kv": _heads(_MAP + "?", "key", "value"),
            "attn_pool/proj": _at(_MAP + "out", layouts=layouts.FROM_HEADS),
            "attn_pool/norm": _at("{p}MAPHead_0/LayerNorm_0"),
            "attn_pool/mlp/fc1": _at("{p}MAPHead_0/MlpBlock_0/Dense_0", layouts=layouts.FLAX_DENSE),
            "attn_pool/mlp/fc2": _at("{p}MAPHead_0/MlpBlock_0/Dense_1", layouts=layouts.FLAX_DENSE),
            "head": _at("{p}head", layouts=layouts.FLAX_DENSE),
        },
        # big_vision.
        "LayerNorm_1": {
            "pos_embed": _at("{p}pos_embedding"),
            _QKV: _heads("{b}MultiHeadDotProductAttention_0/?", "query", "key", "value"),
            _PROJ: _at("{b}MultiHeadDotProductAttention_0/out", layouts=layouts.FROM_HEADS),
            _NORM2: _at("{b}LayerNorm_1"),
            _FC1: _at("{b}MlpBlock_0/Dense_0", layouts=layouts.FLAX_DENSE),
            _FC2: _at("{b}MlpBlock_0/Dense_1", layouts=layouts.FLAX_DENSE),
        },
        # SigLIP 2: made by a scan over the blocks.
        "encoderblock/": {"{b}": _at("{p}Transformer/encoderblock/")},
    },
}  # fmt: skip

# The end of a name that every file of a scheme has once; what stands before it is the prefix.
ANCHORS: dict[str, Scheme] = {
    "patch_embed.proj.weight": "timm",
    "embeddings.patch_embeddings.projection.weight": "hf",
    "embeddings.patch_embeddings.weight": "hf_dinov3",
    "embeddings.patch_embedding.weight": "hf_clip",
    "visual.class_embedding": "openclip",
    "embedding/kernel": "flax",
}
