"""Token reduction for vision transformers, with token decoupling and merging at its heart."""

from tdm_jax.analysis import costs as cost
from tdm_jax.analysis.calibration import calibrate
from tdm_jax.checkpoint import load_pretrained
from tdm_jax.models.registry import create_model
from tdm_jax.models.vit import VisionTransformer, unmerge
from tdm_jax.reduction import describe_reducer, make_reducer

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
