"""Token reduction for vision transformers, with token decoupling and merging at its heart."""

from tdm_jax.analysis import costs as cost
from tdm_jax.analysis.calibration import calibrate
from tdm_jax.checkpoint import load_pretrained
from tdm_jax.data.preprocessing import preprocess
from tdm_jax.exporting.artifact import export_model, load_exported
from tdm_jax.models.casting import cast_weights
from tdm_jax.models.info import unmerge
from tdm_jax.models.preprocessing import Preprocessing
from tdm_jax.models.registry import create_model, list_models
from tdm_jax.models.vit import VisionTransformer
from tdm_jax.reduction import describe_reducer, list_reducers, make_reducer
from tdm_jax.version import __version__

__all__ = [
    "Preprocessing",
    "VisionTransformer",
    "__version__",
    "calibrate",
    "cast_weights",
    "cost",
    "create_model",
    "describe_reducer",
    "export_model",
    "list_models",
    "list_reducers",
    "load_exported",
    "load_pretrained",
    "make_reducer",
    "preprocess",
    "unmerge",
]
