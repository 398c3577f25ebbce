"""Bipartite matching of tokens by their position (ToMe, arXiv 2210.09461), for several methods.

All tokens alternate by position, the prefix counted: even ones are A, odd ones B. Each patch of A
picks its best one in B, and the best edges merge. Prefix tokens neither merge nor are merged into.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tdm_jax.errors import InputError
from tdm_jax.ops.distances import cosine_similarity
from tdm_jax.ops.gathering import gather_tokens, inverse_index, leading_indices
from tdm_jax.ops.merging import Merge
from tdm_jax.ops.ordering import argtopk
from tdm_jax.reduction.contract import BlockContext, ViTShape


def mean_keys(context: BlockContext) -> Float[Array, "b n k"]:
    """The patch tokens' keys, averaged over heads, in float32."""
    attention: Any = context.attention  # there is one at a stage
    return attention.keys().astype(jnp.float32).mean(axis=2)


def mean_keys_macs(n: int, shape: ViTShape) -> int:
    """Multiply-adds of that, the prefix counted: one for each mean."""
    return (n + shape.prefix) * (shape.width // shape.num_heads)


def halves(prefix: int) -> tuple[int, int]:
    """The first patch of A and of B; every second one follows."""
    return prefix % 2, 1 - prefix % 2


def by_similarity(metric: Float[Array, "b n k"], prefix: int, merging: int) -> Merge:
    """Merges the patches of A that are most alike to one of B, by cosine.

    Args:
      metric: what is compared.
      prefix: tokens in front of the patches.
      merging: how many of A merge.

    Returns:
      What is left of A, then B, both by position.
    """
    a, b = halves(prefix)
    similarity = cosine_similarity(metric[:, a::2], metric[:, b::2])
    left, gone = split_best(similarity.max(axis=-1), merging)
    others = similarity.shape[2]
    return Merge(
        keep=jnp.concatenate([a + 2 * left, b + 2 * leading_indices(others, left)], axis=1),
        gone=a + 2 * gone,
        into=left.shape[1] + jnp.argmax(gather_tokens(similarity, gone), axis=-1),
    )


def split_best(
    score: Float[Array, "b m"], count: int
) -> tuple[Int[Array, "b l"], Int[Array, "b r"]]:
    """The others, and the `count` of highest score, both by position."""
    n = score.shape[1]
    rank = inverse_index(argtopk(score, n), n)
    # Those that stay come first.
    order = argtopk((rank >= count).astype(jnp.float32), n)
    return order[:, : n - count], order[:, n - count :]


def at_most_half(title: str, count: int, n: int, by_number: bool) -> int:
    """How many of n tokens a matching leaves that is to leave `count`.

    Args:
      title: of the method.
      count: what its schedule says.
      n: tokens now.
      by_number: whether the schedule removes a number, which shrinks where too few tokens are left.

    Raises:
      InputError: the schedule leaves fewer than half.
    """
    half = n - n // 2
    if count < half and not by_number:
        raise InputError(
            f"{title}: a stage merges at most half of its {n} tokens; expected a count of at "
            f"least {half}; got {count}"
        )
    return max(count, half)


def matching_macs(t: int, width: int) -> int:
    """Multiply-adds of the similarities of t tokens of a width, prefix included."""
    return (t // 2) * (t - t // 2) * width
