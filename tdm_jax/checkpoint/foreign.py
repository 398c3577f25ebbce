"""What in a checkpoint is no part of our model: what is passed over, and what is refused."""

import re
from collections.abc import Collection, Mapping

import numpy as np

from tdm_jax.checkpoint.name_tables import ANCHORS
from tdm_jax.errors import InputError

# The vision tower computes the same without these.
_IGNORED = re.compile(
    "|".join(
        (
            r"(^|[._])mask_token$",
            r"(^|[./])pooler\.",  # a dense layer of Hugging Face's that no classifier reads
            r"(^|\.)position_ids$",
            r"(^|\.)rope(_embed)?\.",  # tables of sines, computed again
            r"(^|\.)decoder[._]",  # MAE's
            r"^(dino|ibot)_head\.",
            # Text towers: Hugging Face's, OpenCLIP's two, big_vision's.
            r"^(module\.)?(text_model|text_projection|text|transformer|token_embedding|ln_final"
            r"|positional_embedding|attn_mask|logit_scale|logit_bias"
            r"|input_resolution|context_length|vocab_size)(\.|$)",
            r"^params/(txt/|t$|b$)",
            r"^opt/state/",
        )
    )
)

_OTHERS = "expected a ViT, DeiT, MAE, DINOv2, DINOv3, EVA-02, SigLIP or CLIP"
# Parts without which another model would compute something else: why, and what would work.
_QUANTISED = "quantised weights; expected those it was made from, in float32, float16 or bfloat16"
_FOREIGN = {
    r"downsample\.reduction|layers\.\d+\.blocks\.|^swin": f"windows and stages (Swin); {_OTHERS}",
    r"rel_pos|relative_position": f"relative position bias (BEiT); {_OTHERS}",
    r"patch_embed\.(backbone|proj\.\d|conv)|conv_root|block\d/unit|conv_proj"
    r"|patch_embeddings\.(backbone|convolution)|visual\.bn1": (
        "convolutions before the blocks (hybrid stem, ResNet); expected patches embedded by one map"
    ),
    r"qweight|qzeros|g_idx|\.SCB$|absmax|quant_state|quant_map|weight_scale|_quantized": _QUANTISED,
    r"\b(q_norm|k_norm|query_norm|key_norm|inner_attn_ln)\b|attn\.norm\.": (
        f"normalised queries and keys, or a norm inside attention; {_OTHERS}"
    ),
    r"pre_logits": (
        "a layer between the final norm and the head (first ImageNet-21k models); expected AugReg's"
    ),
    r"storage_tokens|bias_mask": (
        "facebook's own names of DINOv3; expected timm's or Hugging Face's files of it"
    ),
}  # fmt: skip
_ALONE = {
    r"(^|\.)decoder[._]": "the decoder of MAE alone; expected the encoder too",
    r"text_model\.|token_embedding|^params/txt/|text_projection": (
        "a text tower alone; expected the vision tower or the whole model"
    ),
}


def ignored(name: str) -> bool:
    """Whether an array of this name may be there without being used."""
    return _IGNORED.search(name) is not None


def foreign_parts(names: Collection[str]) -> list[str]:
    """Why a model that has these names is none of ours: one reason each, with what would work."""
    used = [name for name in names if not ignored(name)]
    return [why for pattern, why in _FOREIGN.items() if any(re.search(pattern, n) for n in used)]


def refuse(path: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Says in one line why a checkpoint cannot be represented.

    Raises:
      InputError: it has parts that no family here has, or lacks a vision tower.
    """
    reasons = foreign_parts(arrays)
    if any(a.dtype.itemsize == 1 and a.ndim > 1 for name, a in arrays.items() if not ignored(name)):
        reasons.append(_QUANTISED)
    if not any(name.endswith(tuple(ANCHORS)) for name in arrays):
        reasons += [why for part, why in _ALONE.items() if any(re.search(part, n) for n in arrays)]
    if reasons:
        raise InputError(f"{path}: not supported: {'; '.join(dict.fromkeys(reasons))}")
