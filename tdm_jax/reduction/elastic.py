"""ToMe by a number of merges that only a running program knows, so that one program serves all.

Shapes are static: all tokens stay. Those that still stand for patches lead, in the order in which
ToMe would have left them; the others stand behind them, of size 0, which no query sees. Made for
training with numbers drawn at each step: what it saves in compilations it costs in tokens.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tdm_jax.ops.distances import cosine_similarity
from tdm_jax.ops.gathering import gather_tokens, inverse_index, one_hot, weighted_sum
from tdm_jax.ops.ordering import argtopk
from tdm_jax.reduction.matching import halves
from tdm_jax.reduction.token_state import TokenState


def leading(patches: int, r: Int[Array, ""], merges: int) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """How many tokens lead after so many merges of r, at most half each time, and the next r."""
    alive = jnp.asarray(patches)
    for _ in range(merges):
        alive -= jnp.minimum(r, alive // 2)
    return alive, jnp.minimum(r, alive // 2)


def visible(state: TokenState) -> Float[Array, "b t"]:
    """The factor of each key in proportional attention: 0 where a token stands for no patch."""
    ones = jnp.ones(state.prefix.shape[:2], state.size.dtype)
    return jnp.concatenate([ones, state.size], axis=1)


def merge_leading(
    state: TokenState, metric: Float[Array, "b n k"], alive: Int[Array, ""], r: Int[Array, ""]
) -> TokenState:
    """What `matching.by_similarity` does to the first `alive` tokens, of which r merge."""
    n, (a, b) = state.count, halves(state.prefix.shape[1])
    place = jnp.arange(n)
    # Nothing is less alike than -1.
    similarity = jnp.where(
        place[b::2] < alive, cosine_similarity(metric[:, a::2], metric[:, b::2]), -2.0
    )
    score = jnp.where(place[a::2] < alive, similarity.max(axis=-1), -2.0)
    gone = jnp.zeros(state.size.shape, bool)
    gone = gone.at[:, a::2].set(inverse_index(argtopk(score, score.shape[1]), score.shape[1]) < r)
    into = jnp.zeros(state.size.shape, jnp.int32)
    into = into.at[:, a::2].set(b + 2 * jnp.argmax(similarity, axis=-1))
    # What is left of A, then B, both by position, then what no longer counts.
    first = (place % 2 == a).astype(jnp.float32)
    order = argtopk(jnp.where(gone | (place >= alive), -1.0, first), n)
    route = inverse_index(order, n)
    route = jnp.where(gone, gather_tokens(route, into), route)
    share = one_hot(route, n) * state.size[..., None]
    tokens = weighted_sum(share / jnp.maximum(share.sum(axis=1, keepdims=True), 1.0), state.tokens)
    return state.replace_tokens(tokens, route, gather_tokens(state.kind, order))


def drawn_pair(key: Array, most: int) -> Int[Array, "2"]:
    """Two numbers of merges from 0 to `most`."""
    return jax.random.randint(key, (2,), 0, most + 1)
