"""The token set of a batch: what a reducer is given and gives back, and how it changes."""

import enum
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from tdm_jax.ops.gathering import (
    gather_patches,
    gather_sequence,
    gather_tokens,
    inverse_index,
    leading_indices,
    one_hot,
)
from tdm_jax.ops.merging import Merge, merge_groups


class TokenKind(enum.IntEnum):
    """What a token is made of, for pictures and for readers of the source map."""

    KEPT = 0
    MATCHED = 1
    CLUSTER = 2
    FUSED = 3


class TokenState(struct.PyTreeNode):
    """The tokens of a batch at one point of the network, and what they stand for.

    Attributes:
      prefix: class, distillation and register tokens; every reducer lets them pass.
      tokens: patch tokens, or what has become of them.
      assign: for each patch of the image the index of the token that stands for it, -1 once it
        has been dropped. A partition: no patch is counted twice.
      size: how many patches each token stands for.
      kind: the `TokenKind` of each token.
      valid: 1 for a real token, 0 for an empty or masked slot; None where all are real. Float,
        so that the gradient of a straight-through mask can pass.
      dropped_values: the value each dropped patch had when it was dropped; None unless asked for.
      details: what merging took from each patch: the sum, over all merges, of its token before less
        the one after; 0 for dropped ones from then on. None unless asked for.
      carry: what a method hands from one block to the next.
      moved: whether a token may stand elsewhere than the patch of the same number.
    """

    prefix: Float[Array, "b s d"]
    tokens: Float[Array, "b n d"]
    assign: Int[Array, "b p"]
    size: Float[Array, "b n"]
    kind: Int[Array, "b n"]
    valid: Float[Array, "b n"] | None = None
    dropped_values: Float[Array, "b p d"] | None = None
    details: Float[Array, "b p d"] | None = None
    carry: dict[str, Any] = struct.field(default_factory=dict)
    moved: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def start(
        cls,
        prefix: Float[Array, "b s d"],
        tokens: Float[Array, "b n d"],
        keep_dropped: bool = False,
    ) -> "TokenState":
        """The state before the first block: each token stands for its own patch."""
        shape = tokens.shape[:2]
        return cls(
            prefix=prefix,
            tokens=tokens,
            assign=leading_indices(shape[1], tokens),
            size=jnp.ones(shape, jnp.float32),
            kind=jnp.full(shape, TokenKind.KEPT),
            dropped_values=jnp.zeros_like(tokens) if keep_dropped else None,
            details=jnp.zeros_like(tokens) if keep_dropped else None,
        )

    @property
    def count(self) -> int:
        """Patch tokens now."""
        return self.tokens.shape[1]

    def positions(self, grid: tuple[int, int]) -> Float[Array, "#b n 2"]:
        """Row and column of each token: the mean over the patches that it stands for.

        A token that stands for none is at the centre of the image.
        """
        places = jnp.asarray(np.indices(grid).reshape(2, -1).T, jnp.float32)
        if not self.moved:
            return places[None]
        share = one_hot(self.assign, self.count)  # [b, p, n]
        total = share.sum(axis=1)[..., None]
        summed = jnp.einsum("bpn,pc->bnc", share, places, precision=jax.lax.Precision.HIGHEST)
        return jnp.where(total > 0, summed / jnp.maximum(total, 1.0), places.mean(axis=0))

    def proportional(self, power: float = 1.0) -> Float[Array, "b t"] | None:
        """The factor of each key in proportional attention (ToMe, arXiv 2210.09461, equation 1).

        A token counts as often as it stands for patches; one that stands for none, like the prefix,
        counts once. None until tokens have merged.

        Args:
          power: of the size; 1 is ToMe's.
        """
        if not self.moved:
            return None
        ones = jnp.ones(self.prefix.shape[:2], self.size.dtype)
        size = jnp.where(self.size > 0, self.size, 1)
        return jnp.concatenate([ones, size if power == 1 else size**power], axis=1)

    def sequence(self) -> Float[Array, "b t d"]:
        """Prefix and patch tokens as one sequence."""
        return jnp.concatenate([self.prefix, self.tokens], axis=1)

    def with_sequence(self, sequence: Float[Array, "b t d"]) -> "TokenState":
        """The inverse of `sequence`: the same set with new values."""
        s = self.prefix.shape[1]
        return self.replace(prefix=sequence[:, :s], tokens=sequence[:, s:])

    def gather(self, index: Int[Array, "b k"]) -> Float[Array, "b k d"]:
        """The values of the patch tokens at `index`."""
        return gather_patches(self.sequence(), self.prefix.shape[1], index)

    def replace_tokens(
        self,
        tokens: Float[Array, "b m d"],
        route: Int[Array, "b n"],
        kind: Int[Array, "b m"],
        valid: Float[Array, "b m"] | None = None,
    ) -> "TokenState":
        """Replaces the token set; sizes, source map and last values follow from `route`.

        Args:
          tokens: the new tokens.
          route: for each old token the index of the new one that stands for it, -1 if dropped.
          kind: what each new token is made of.
          valid: 0 for empty slots, None where all are real.
        """
        joined = one_hot(route, tokens.shape[1])  # [b, n, m]
        alive = self.assign >= 0
        moved = gather_tokens(route, jnp.maximum(self.assign, 0))
        dropped_values, details = self.dropped_values, self.details
        if dropped_values is not None and details is not None:
            dropped = alive & (moved < 0)
            before = gather_tokens(self.tokens, jnp.maximum(self.assign, 0))
            dropped_values = jnp.where(dropped[..., None], before, dropped_values)
            after = gather_tokens(tokens.astype(before.dtype), jnp.maximum(moved, 0))
            stays = (alive & (moved >= 0))[..., None]
            details = jnp.where(stays, details + (before - after), 0)
        return self.replace(
            tokens=tokens.astype(self.tokens.dtype),
            assign=jnp.where(alive, moved, -1),
            size=jnp.einsum("bn,bnm->bm", self.size, joined, precision=jax.lax.Precision.HIGHEST),
            kind=kind,
            valid=valid,
            dropped_values=dropped_values,
            details=details,
            moved=True,
        )

    def select(self, index: Int[Array, "b k"]) -> "TokenState":
        """Keeps the tokens at `index`, in that order, and drops the others."""
        s = self.prefix.shape[1]
        x = gather_sequence(
            self.sequence(), jnp.concatenate([leading_indices(s, index), s + index], axis=1)
        )
        valid = None if self.valid is None else gather_tokens(self.valid, index)
        route = inverse_index(index, self.count)
        state = self.replace_tokens(x[:, s:], route, gather_tokens(self.kind, index), valid)
        return state.replace(prefix=x[:, :s])

    def merge(self, groups: Sequence[Merge], weight: Float[Array, "b n"] | None) -> "TokenState":
        """Keeps some tokens, averages others into them, and drops the rest.

        Args:
          groups: which; no token is in two of them.
          weight: of each token in an average; None for no average: what others join stays as it is.

        Returns:
          The state whose tokens are each group's `keep`, in that order; MATCHED where others
          joined.
        """
        s = self.prefix.shape[1]
        merge = functools.reduce(Merge.beside, groups)
        route = merge.route(self.count)
        if weight is None:
            kept = jnp.concatenate([leading_indices(s, merge.keep), s + merge.keep], axis=1)
            x = gather_sequence(self.sequence(), kept)
        else:
            x = merge_groups(self.sequence(), weight, groups, route)
        joined = one_hot(merge.into, merge.keep.shape[1], bool).any(axis=1)
        kind = jnp.where(joined, TokenKind.MATCHED, gather_tokens(self.kind, merge.keep))
        return self.replace_tokens(x[:, s:], route, kind).replace(prefix=x[:, :s])

    def append(self, token: Float[Array, "b 1 d"], kind: int) -> "TokenState":
        """Adds a token that stands for no patch."""
        return self.replace(
            tokens=jnp.concatenate([self.tokens, token.astype(self.tokens.dtype)], axis=1),
            size=jnp.pad(self.size, ((0, 0), (0, 1))),
            kind=jnp.pad(self.kind, ((0, 0), (0, 1)), constant_values=kind),
        )


def with_fused(kind: Int[Array, "b n"]) -> Int[Array, "b m"]:
    """The kinds of tokens with a fused one behind them."""
    return jnp.pad(kind, ((0, 0), (0, 1)), constant_values=TokenKind.FUSED)
