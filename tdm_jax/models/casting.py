"""Weights in the type of the computation, made once instead of in every forward pass."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util


def cast_weights(variables: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """Variables for inference in another type, with the answers that the float32 ones give.

    In bfloat16 on a CPU casting them takes up to 45% of a forward pass of one image
    (docs/measurements.md, bfloat16). A training keeps float32: small updates are lost otherwise.

    Args:
      variables: `{"params": ...}`, as `load_pretrained` and `model.init` return them.
      dtype: the model's, `model.dtype`.

    Returns:
      The same, in `dtype` all that a model in `dtype` rounds to it anyway: kernels and embeddings.
      Biases, norms and what a method has learned stay as they are.
    """
    flat = traverse_util.flatten_dict(variables, sep="/")

    def rounded(path: str, array: Any) -> bool:
        return np.ndim(array) >= 2 and not path.startswith("params/reducer/")

    stored = {k: jnp.asarray(x, dtype if rounded(k, x) else None) for k, x in flat.items()}
    return traverse_util.unflatten_dict(stored, sep="/")
