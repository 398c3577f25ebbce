"""Token reduction for vision transformers, with token decoupling and merging at its heart."""

from tdm_jax import cost
from tdm_jax.calibration import calibrate
from tdm_jax.checkpoint import load_pretrained
from tdm_jax.models import create_model
from tdm_jax.reduction import describe_reducer, make_reducer
from tdm_jax.vit import VisionTransformer, unmerge

__all__ = [
    "VisionTransformer",
    "calibrate",
    "cost",
    "create_model",
    "describe_reducer",
    "load_pretrained",
    "make_reducer",
    "unmerge",
]
__version__ = "0.1.0"
