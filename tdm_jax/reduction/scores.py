"""How important a patch token is, as seen in a block's attention.

All scores are positive and sum to at most 1 over the tokens, so each can also weigh a merge.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from tdm_jax.reduction.contract import Attention


def _class(attention: Attention) -> Float[Array, "b n"]:
    return attention.class_row().mean(axis=1)


def _mean(attention: Attention) -> Float[Array, "b n"]:
    received = attention.received()
    # Each query hands out 1 per head; without a class token their number is n.
    return received / jnp.maximum(received.sum(axis=-1, keepdims=True), 1e-18)


def _key_norm(attention: Attention) -> Float[Array, "b n"]:
    keys = attention.keys().astype(jnp.float32)
    norm = jnp.sqrt((keys * keys).sum(axis=(2, 3)))
    return norm / jnp.maximum(norm.sum(axis=-1, keepdims=True), 1e-18)


SCORES = {"class": _class, "mean": _mean, "key_norm": _key_norm}


def importance(score: str, attention: Attention) -> Float[Array, "b n"]:
    """The patch tokens' importance, in float32.

    Args:
      score: "class", the class token's attention averaged over heads (EViT, TDM); "mean", the
        share of all attention that a token receives; "key_norm", the share of its key's norm.
        The last two need no class token.
      attention: the block's.
    """
    return SCORES[score](attention)
