"""Token reduction for vision transformers, with token decoupling and merging at its heart."""

from tdm_jax.models import create_model
from tdm_jax.reduction import make_reducer
from tdm_jax.vit import VisionTransformer, unmerge

__all__ = ["VisionTransformer", "create_model", "make_reducer", "unmerge"]
__version__ = "0.1.0"
