"""PyTorch checkpoints in and out, and Orbax storage."""

from tdm_jax.checkpoint.descriptions import describe
from tdm_jax.checkpoint.export import save_safetensors, to_state_dict
from tdm_jax.checkpoint.pretrained import load_pretrained, read_state_dict
from tdm_jax.checkpoint.saved_model import load_model, save_model
from tdm_jax.checkpoint.store import Store

__all__ = [
    "Store",
    "describe",
    "load_model",
    "load_pretrained",
    "read_state_dict",
    "save_model",
    "save_safetensors",
    "to_state_dict",
]
