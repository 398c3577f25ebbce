"""The random network that the originals were run on, and what they answered."""

from pathlib import Path

import jax
import numpy as np
import pytest

from tdm_jax.checkpoint import load_pretrained

GOLDENS = Path(__file__).parents[1] / "goldens"


@pytest.fixture(scope="session")
def golden():
    """Arrays of a golden file by name; entries `w:...` are a method's own weights."""

    def read(name):
        with np.load(GOLDENS / f"{name}.npz") as arrays:
            return dict(arrays)

    return read


@pytest.fixture(scope="session")
def answer():
    """Logits and `Info` of a reducer in the originals' network, on their images."""
    images = np.load(GOLDENS / "images_nchw.npy").transpose(0, 2, 3, 1)

    def run(reducer, arrays=None):
        own = {k.removeprefix("w:"): v for k, v in (arrays or {}).items() if k.startswith("w:")}
        model, params = load_pretrained(
            GOLDENS / "timm_deit.safetensors",
            reducer,
            num_heads=3,
            extra_weights=own or None,
        )
        return jax.jit(lambda p, x: model.apply(p, x, return_info=True))(params, images)

    return run
