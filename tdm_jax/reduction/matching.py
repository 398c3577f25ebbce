"""Bipartite matching of tokens: each of A picks its most similar one in B, the best pairs merge.

ToMe (arXiv 2210.09461) splits by position: all tokens alternate, the prefix counted, even ones
are A, odd ones B. TDM (arXiv 2211.11315) and PiToMe (arXiv 2405.16148) split by rank, of importance
and of energy. Prefix tokens neither merge nor are merged into.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tdm_jax.errors import InputError
from tdm_jax.ops.distances import cosine_similarity
from tdm_jax.ops.gathering import gather_tokens, inverse_index, leading_indices
from tdm_jax.ops.merging import Merge
from tdm_jax.ops.ordering import argtopk


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
    return _best_pairs(similarity, similarity.max(axis=-1), (a, b), merging)


def by_cost(
    metric: Float[Array, "b n k"],
    prefix: int,
    merging: int,
    penalties: Sequence[tuple[Float[Array, "b n"], float]],
    one_sided: float,
) -> Merge:
    """Merges the patches of A where it costs least to lose what tells the two apart.

    Joining a and b costs `(1 - cos) prod_w (w_a w_b / (w_a + w_b))^p` for each weight w and its
    power p in `penalties`, and `one_sided` times more where some other of A would join b for less.

    Args:
      metric: what is compared.
      prefix: tokens in front of the patches.
      merging: how many of A merge.
      penalties: positive weights of the tokens, and powers.
      one_sided: see above.

    Returns:
      What is left of A, then B, both by position.
    """
    a, b = halves(prefix)
    # Rounding may find tokens alike beyond 1, and a weight of 0 would make all alike.
    cost = jnp.maximum(1 - cosine_similarity(metric[:, a::2], metric[:, b::2]), 1e-6)
    exponent: Array | float = 0.0
    for weight, power in penalties:
        weight = jnp.maximum(weight.astype(jnp.float32), 1e-9)
        own, other = weight[:, a::2, None], weight[:, None, b::2]
        exponent += power * jnp.log(own * other / (own + other))
    cost *= jnp.exp(exponent)
    least = cost.min(axis=-1)
    if one_sided:
        # Comparisons take a CPU half as long as the two argmins that say the same.
        both = (cost == least[..., None]) & (cost == cost.min(axis=1, keepdims=True))
        least = jnp.where(both.any(axis=-1), least, (1 + one_sided) * least)
    return _best_pairs(-cost, -least, (a, b), merging)


def _best_pairs(
    similarity: Float[Array, "b m l"],
    score: Float[Array, "b m"],
    starts: tuple[int, int],
    merging: int,
) -> Merge:
    """Merges those of A that score highest, each into the most similar of B."""
    (a, b), others = starts, similarity.shape[2]
    left, gone = split_best(score, merging)
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


def energy(similarity: Float[Array, "b n n"], margin: float) -> Float[Array, "b n"]:
    """How large a group of alike tokens each one belongs to: the mean of `elu(C - margin)`."""
    return jax.nn.elu(similarity - margin).mean(axis=-1)


def by_edge(similarity: Float[Array, "b n n"], rank: Int[Array, "b n"], merging: int) -> Merge:
    """Merges the most alike pairs of tokens of even and of odd rank.

    Args:
      similarity: of all tokens.
      rank: the tokens, best first.
      merging: how many merge.
    """
    even, odd = rank[:, 0::2], rank[:, 1::2]
    pairs = between(similarity, even, odd)
    order = argtopk(pairs.max(axis=-1), even.shape[1])
    gone, left = order[:, :merging], order[:, merging:]
    return Merge(
        keep=jnp.concatenate([gather_tokens(even, left), odd], axis=1),
        gone=gather_tokens(even, gone),
        into=left.shape[1] + gather_tokens(jnp.argmax(pairs, axis=-1), gone),
    )


def by_rank(similarity: Float[Array, "b n n"], rank: Int[Array, "b n"], merging: int) -> Merge:
    """Merges of the first ranks every second token into the most alike of those between.

    Args:
      similarity: of all tokens.
      rank: the tokens, best first.
      merging: how many merge.
    """
    paired, others = rank[:, : 2 * merging], rank[:, 2 * merging :]
    even, odd = paired[:, 0::2], paired[:, 1::2]
    return Merge(
        keep=jnp.concatenate([others, odd], axis=1),
        gone=even,
        into=others.shape[1] + jnp.argmax(between(similarity, even, odd), axis=-1),
    )


def between(
    similarity: Float[Array, "b n n"], rows: Int[Array, "b r"], columns: Int[Array, "b c"]
) -> Float[Array, "b r c"]:
    """The similarities of some tokens with some others. They are symmetric."""
    return gather_tokens(jnp.swapaxes(gather_tokens(similarity, columns), 1, 2), rows)


def match(tokens: Float[Array, "b k d"], count: int) -> Merge:
    """Merges tokens in homogeneous pairs until `count` are left.

    The k - count sources that are most alike to a destination (cosine) join it.

    Args:
      tokens: the ceil(k / 2) destinations, then the sources.
      count: at least ceil(k / 2).

    Returns:
      What goes on: the destinations, then the sources that stay alone, the most alike first.
    """
    k = tokens.shape[1]
    destinations, merging = -(-k // 2), k - count
    similarity = cosine_similarity(tokens[:, destinations:], tokens[:, :destinations])
    order = argtopk(similarity.max(axis=-1), k - destinations)
    gone, stay = order[:, :merging], order[:, merging:]
    return Merge(
        keep=jnp.concatenate([leading_indices(destinations, tokens), destinations + stay], axis=1),
        gone=destinations + gone,
        into=jnp.argmax(gather_tokens(similarity, gone), axis=-1),
    )
