"""A method's change of the kernels, made once instead of in every forward pass."""

from typing import Any

from tdm_jax.models.vit import VisionTransformer
from tdm_jax.reduction import BlockContext


def fold(
    model: VisionTransformer, variables: dict[str, Any]
) -> tuple[VisionTransformer, dict[str, Any]]:
    """A model that answers the same without its method's weights.

    Args:
      model: its method may add to the kernels of queries, keys and values (`Reducer.qkv_update`).
      variables: `{"params": ...}`.

    Returns:
      The model with the method that is left (`Reducer.folded`), and its variables. Both as they
      were where the method adds nothing.
    """
    left = model.reducer.folded()
    if left == model.reducer:
        return model, variables
    params = dict(variables["params"])
    weights = params.pop("reducer", {})
    for layer in range(model.depth):
        context = BlockContext(layer, model.shape, train=False, weights=weights)
        update = model.reducer.qkv_update(context)
        if update is not None:
            block = params[f"blocks_{layer}"]
            attn = block["attn"]
            qkv = {**attn["qkv"], "kernel": attn["qkv"]["kernel"] + update}
            params[f"blocks_{layer}"] = {**block, "attn": {**attn, "qkv": qkv}}
    return model.clone(reducer=left), {**variables, "params": params}
