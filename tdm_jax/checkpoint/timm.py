"""A model as timm has it: names of its VisionTransformer or its Eva, and config.json."""

from typing import Any

import numpy as np

from tdm_jax.checkpoint.names import Naming, to_torch
from tdm_jax.checkpoint.rewriting import Params, rewritten
from tdm_jax.errors import InputError
from tdm_jax.models.preprocessing import Preprocessing
from tdm_jax.models.vit import VisionTransformer


def to_timm(
    model: VisionTransformer, params: Params
) -> tuple[VisionTransformer, dict[str, np.ndarray]]:
    """A model as timm's `VisionTransformer` has it, or with rotary positions its `Eva`.

    Returns:
      The model that the arrays are of, which computes the same; and what `load_state_dict` takes
      there. A learned reducer's weights keep their path ("reducer/...").

    Raises:
      InputError: timm has no such model.
    """
    if model.pooling == "token_avg":
        raise InputError(
            "timm has no pool='token_avg'; expected another --pool, or --format=hugging_face"
        )
    # What holds queries, keys and values together has all three biases there, or two in Eva.
    biases = "qkv" if model.rotary is None else "qv"
    fields: dict[str, Any] = {"patch_bias": not model.pre_norm}
    fields["qkv_bias"] = biases if model.qkv_bias else ""
    if model.num_registers and model.positions == "all":
        fields["positions"] = "patches"  # its registers would have one too
    if model.num_classes:
        fields["head_bias"] = True
    model, params = rewritten(model, params, fields, "timm's transformer")
    forms = set()
    if model.rotary is not None:
        forms.add("gamma_1")
        # EVA-02 has one matrix for gate and value up to its small size.
        if model.mlp_norm:
            forms |= {"attn.q_proj", "mlp.fc1_g"}
        else:
            forms |= {"q_bias"} if model.qkv_bias else set()
            forms |= {"mlp.fc1_g"} if model.gated_mlp and not model.rotary.interleaved else set()
    naming = Naming("timm", forms=frozenset(forms), qkv_bias=model.qkv_bias)
    return model, to_torch(naming, params)


def timm_config(model: VisionTransformer) -> dict[str, Any]:
    """The config.json from which timm builds a model that `to_timm` returned.

    Raises:
      InputError: there is no architecture there from which it could be had.
    """
    # A norm's epsilon and the kind of an MLP are no arguments that JSON can hold.
    architecture, epsilon = _architecture(model)
    if model.layer_norm_eps != epsilon:
        raise InputError(
            f"timm's {architecture} has layer_norm_eps={epsilon}; got {model.layer_norm_eps}: "
            f"expected --layer_norm_eps={epsilon}, or --format=timm with a name that ends in "
            ".safetensors"
        )
    hidden = model.mlp_hidden * (2 if model.gated_mlp and model.rotary is None else 1)
    arguments: dict[str, Any] = {
        "img_size": list(model.image_size),
        "patch_size": model.patch_size,
        "in_chans": model.in_channels,
        "num_classes": model.num_classes,
        "global_pool": model.pooling,
        "embed_dim": model.width,
        "depth": model.depth,
        "num_heads": model.num_heads,
        "mlp_ratio": (hidden + 0.5) / model.width,  # rounded down there
        "qkv_bias": model.qkv_bias != "",
        "init_values": 1e-5 if model.layer_scale else None,
        "class_token": model.class_token,
        "no_embed_class": model.positions == "patches",
    }
    if model.rotary is None:
        arguments |= {
            "reg_tokens": model.num_registers,
            "pre_norm": model.pre_norm,
            "fc_norm": model.fc_norm,
            "act_layer": model.activation,
            "scale_mlp_norm": model.mlp_norm,
            "pos_embed": "none" if model.positions == "none" else "learn",
        }
    else:
        arguments |= {
            "num_reg_tokens": model.num_registers,
            "use_pre_transformer_norm": model.pre_norm,
            "use_fc_norm": model.fc_norm,
            "use_abs_pos_emb": model.positions != "none",
            "rope_temperature": model.rotary.temperature,
            "swiglu_align_to": int(model.gated_mlp and not model.rotary.interleaved),
        }
        if model.rotary.reference_grid is not None:
            arguments["ref_feat_shape"] = [model.rotary.reference_grid] * 2
    prepared = model.preprocessing or Preprocessing()
    return {
        "architecture": architecture,
        "num_classes": model.num_classes,
        "num_features": model.width,
        "global_pool": model.pooling,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [model.in_channels, *model.image_size],
            "num_classes": model.num_classes,
            "first_conv": "patch_embed.proj",
            "classifier": ["head", "head_dist"] if model.distilled else "head",
            **prepared.describe(),
        },
    }


def _architecture(model: VisionTransformer) -> tuple[str, float]:
    """The published model that has what arguments cannot say, and its epsilon."""
    if model.rotary is None:
        if model.distilled:
            return "deit_base_distilled_patch16_224", 1e-6
        if model.gated_mlp:
            return "vit_giant_patch14_dinov2", 1e-6
        clips = model.layer_norm_eps == 1e-5
        return ("vit_base_patch16_clip_224", 1e-5) if clips else ("vit_base_patch16_224", 1e-6)
    if not model.rotary.interleaved:
        return f"vit_small_{'plus_' if model.gated_mlp else ''}patch16_dinov3", 1e-5
    return f"eva02_{'base' if model.mlp_norm else 'tiny'}_patch14_224", 1e-6
