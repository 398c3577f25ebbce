"""What a forward pass can tell besides its logits, and the way back to the full grid of patches."""

from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from tdm_jax.errors import InputError
from tdm_jax.ops.gathering import gather_tokens
from tdm_jax.reduction.token_state import TokenState


@struct.dataclass
class Stage:
    """The source map right after a block that changed the token set (see TokenState)."""

    layer: int = struct.field(pytree_node=False)
    assign: Int[Array, "b p"]
    size: Float[Array, "b n"]
    kind: Int[Array, "b n"]

    @classmethod
    def of(cls, layer: int, state: TokenState) -> "Stage":
        """Of the state that leaves a block."""
        return cls(layer, state.assign, state.size, state.kind)


@struct.dataclass
class Intermediate(Stage):
    """The tokens that leave a block, and their source map.

    Attributes:
      features: all tokens, prefix first, before any norm.
      dropped_values: the value of each patch dropped so far when it was dropped.
    """

    features: Float[Array, "b t d"]
    dropped_values: Float[Array, "b p d"]

    @classmethod
    def of(cls, layer: int, state: TokenState) -> "Intermediate":
        """Of the state that leaves a block."""
        source = state.assign, state.size, state.kind
        dropped: Any = state.dropped_values  # kept for Info
        return cls(layer, *source, state.sequence(), dropped)


@struct.dataclass
class Info:
    """What a forward pass can tell besides its logits.

    Attributes:
      token_counts: patch tokens that leave each block.
      features: all tokens after the final norm, prefix first.
      pooled: what the head reads; of two heads the mean.
      assign: for each patch the final token that stands for it, -1 if it was dropped.
      size: patches that each final token stands for.
      kind: what each final token is made of (`TokenKind`).
      valid: 0 for empty slots of methods with an adaptive count, None where all are real.
      dropped_values: dropped patches' last values, through the final norm.
      patches: each patch's own feature, through the final norm: its token's value with the details
        that merging took from it; of a dropped patch its last value.
      stages: the source map after each block that changed it.
      intermediates: the tokens that leave the blocks that were asked for, in the order asked.
      carry: what the method carried to the end.
      prefix: tokens at the front of `features` that are no patches.
    """

    token_counts: tuple[int, ...] = struct.field(pytree_node=False)
    features: Float[Array, "b t d"]
    pooled: Float[Array, "b k"]
    assign: Int[Array, "b p"]
    size: Float[Array, "b n"]
    kind: Int[Array, "b n"]
    valid: Float[Array, "b n"] | None
    dropped_values: Float[Array, "b p d"]
    patches: Float[Array, "b p d"]
    stages: tuple[Stage, ...]
    intermediates: tuple[Intermediate, ...]
    carry: dict[str, Any]
    prefix: int = struct.field(pytree_node=False)


def unmerge(
    info: Info,
    values: Intermediate | Float[Array, "b n c"] | None = None,
    fill: float | None = None,
) -> Float[Array, "b p c"]:
    """Tokens' values on the full grid of patches, for dense use.

    Args:
      info: of a forward pass.
      values: a block's, as `info.intermediates` has them, or any values of the final patch tokens;
        None for the final features.
      fill: value of dropped patches; None for the one that each had when it was dropped, which for
        values from elsewhere nobody knows: 0.

    Returns:
      For each patch the value of the token that stands for it. (`info.patches` also has what tells
      it from the others that the token stands for.)

    Raises:
      InputError: the values are not one for each final patch token.
    """
    if values is None or isinstance(values, Intermediate):
        source = info if values is None else values
        tokens, dropped = source.features[:, info.prefix :], source.dropped_values
    elif values.shape[:2] == info.size.shape:
        source, tokens, dropped = info, values, 0
    else:
        raise InputError(
            f"values must be [batch, tokens, channels] of the {info.size.shape[1]} final patch "
            f"tokens of {info.size.shape[0]} images; got {values.shape}"
        )
    patches = gather_tokens(tokens, jnp.maximum(source.assign, 0))
    return jnp.where((source.assign >= 0)[..., None], patches, dropped if fill is None else fill)
