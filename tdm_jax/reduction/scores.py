"""How important a patch token is: what a method can rank tokens by without weights of its own.

All scores are positive and sum to at most 1 over the tokens, so each can also weigh a merge. With
n tokens of d channels in h heads:

| score | importance | cost beside the model's own | needs |
|---|---|---|---|
| "class" | attention of the class token, averaged over heads (EViT, TDM) | O(n d) | class token |
| "mean" | share of all attention that a token receives | O(n^2 d), and the n x n map | |
| "key_norm" | share of its key's norm, without its position | O(n d) | |
| "pool" | attention of the pooling head's query, averaged over heads | O(n d h) | pooling head |
| "shift" | share of the norm of what the MLP of the block before added | O(n d), no attention | |

The shift is Representation Shift (arXiv 2508.00367), `||F(x) - x||_2` with F the MLP and its
residual, which is the norm of what the MLP adds, layer scale included: tokens that it hardly
changes go first.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from tdm_jax.errors import InputError
from tdm_jax.reduction.contract import BlockContext, ViTShape
from tdm_jax.reduction.token_state import TokenState

# What ranks the tokens of a model where nobody says it: with a class token, and without.
CLASS_TOKEN_DEFAULT = "class"
BARE_DEFAULT = "mean"

_SHIFT = "scores/shift"


class Score(NamedTuple):
    """One way to rank tokens.

    Attributes:
      measure: of the tokens at a stage, in float32, given a context with attention.
      macs: multiply-adds of that by torchprofile's convention, of n tokens.
      needs: what the model must have.
      fits: whether a model has that.
    """

    measure: Callable[[TokenState, BlockContext], Float[Array, "b n"]]
    macs: Callable[[int, ViTShape], int]
    needs: str = ""
    fits: Callable[[ViTShape], bool] = lambda shape: True


def _class(state: TokenState, context: BlockContext) -> Float[Array, "b n"]:
    attention: Any = context.attention  # there is one at a stage
    return attention.class_row().mean(axis=1)


def _mean(state: TokenState, context: BlockContext) -> Float[Array, "b n"]:
    attention: Any = context.attention
    # Each query hands out 1 per head; without a class token their number is n.
    return _share(attention.received())


def _key_norm(state: TokenState, context: BlockContext) -> Float[Array, "b n"]:
    attention: Any = context.attention
    keys = attention.keys().astype(jnp.float32)
    return _share(jnp.sqrt((keys * keys).sum(axis=(2, 3))))


def _pool(state: TokenState, context: BlockContext) -> Float[Array, "b n"]:
    query: Any = context.pooling
    return query(state.tokens).mean(axis=1)


def _shift(state: TokenState, context: BlockContext) -> Float[Array, "b n"]:
    return state.carry[_SHIFT]


def _share(value: Float[Array, "b n"]) -> Float[Array, "b n"]:
    return value / jnp.maximum(value.sum(axis=-1, keepdims=True), 1e-18)


def _pool_macs(n: int, shape: ViTShape) -> int:
    d, heads = shape.width, shape.num_heads
    # The norm, the products with each head's query, and the mean over heads.
    own = n * (d + d * heads + 1)
    # The queries are folded into the keys' map, with the norm's scale, once: where all patches are.
    return own + (2 * d * d + 2 * d * heads if n == shape.patches else 0)


SCORES = {
    # The mean over heads; over heads and queries; the squares.
    "class": Score(_class, lambda n, _: n, "a class token", lambda shape: shape.class_token),
    "mean": Score(_mean, lambda n, _: n),
    "key_norm": Score(_key_norm, lambda n, shape: n * shape.width),
    "pool": Score(_pool, _pool_macs, "a pooling head", lambda shape: shape.pool == "map"),
    "shift": Score(_shift, lambda n, shape: n * shape.width),
}


def default_importance(shape: ViTShape) -> str:
    """The score for a model where nobody chooses one."""
    return CLASS_TOKEN_DEFAULT if shape.class_token else BARE_DEFAULT


def check_importance(title: str, name: str, layers: tuple[int, ...], shape: ViTShape) -> None:
    """Raises InputError if a score cannot be had of a model at these layers."""
    score = SCORES[name]
    if not score.fits(shape):
        others = [repr(other) for other in SCORES if SCORES[other].fits(shape)]
        raise InputError(
            f"{title}: importance {name!r} needs {score.needs} and the model has none; expected "
            f"importance={', '.join(others[:-1])} or {others[-1]}"
        )
    if name == "shift" and 0 in layers:
        raise InputError(
            f"{title}: importance 'shift' is what the block before has added to a token; expected "
            f"layers from 1; got {', '.join(map(str, layers))}"
        )


def record_shift(state: TokenState, update: Float[Array, "b n d"]) -> TokenState:
    """The tokens that leave a block with what the stage in the next one will rank them by."""
    update = update.astype(jnp.float32)
    # Bounded below: no norm has a gradient at 0.
    norm = jnp.sqrt(jnp.maximum((update * update).sum(axis=-1), 1e-18))
    return state.replace(carry={**state.carry, _SHIFT: _share(norm)})


def forget_shift(state: TokenState) -> TokenState:
    """The tokens behind a stage: what was recorded was of those before it."""
    carry = {name: value for name, value in state.carry.items() if name != _SHIFT}
    return state.replace(carry=carry)
