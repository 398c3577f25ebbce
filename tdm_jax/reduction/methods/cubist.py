"""CubistMerge: Spatial-Preserving Token Merging for Diverse ViT Backbones (arXiv 2509.21764).

Once, before one block, on the grid of patches: every row loses the same number of tokens, then
every column of what is left, so that the result is a smaller grid in reading order, as windows,
rotary positions and dense outputs need it. In a line of tokens:

1. A token at an odd place may join the one before or behind it, whichever has the higher cosine
   (the first of equals; the last of a line may have only the one before).
2. Those with the r highest of these cosines do.
3. A merged token has, channel by channel, the value of largest magnitude (equal ones: the target's
   own).

Behind it the network is an ordinary one: no sizes, no proportional attention. Two tokens can join
the same one. The original program then forgets one of them: it writes those of even rank, then
those of odd rank, each compared with the target as it was, and the last stands. That is
`shared="last"`; among equal parity, which the original leaves to chance, the higher rank stands.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tdm_jax.errors import InputError, unknown
from tdm_jax.ops.distances import unit
from tdm_jax.ops.gathering import gather_tokens, inverse_index
from tdm_jax.ops.ordering import argtopk
from tdm_jax.reduction.contract import BlockContext, BlockPlan, Reducer, ViTShape, require
from tdm_jax.reduction.token_state import TokenKind, TokenState

SHARED = ("all", "last")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CubistMerge(Reducer):
    """Merges neighbours so that the grid of patches loses rows and columns.

    Attributes:
      block: the block before which it happens, from 0.
      remove_rows: rows that the grid loses: tokens that each column does.
      remove_columns: columns that the grid loses: tokens that each row does, first.
      shared: what a token has that two others join: the largest magnitude of "all", or only the
        "last" one's and its own, as in the original program.
    """

    before: ClassVar[bool] = True

    block: int = 1
    remove_rows: int = 1
    remove_columns: int = 1
    shared: str = "all"

    def __post_init__(self) -> None:
        for setting in ("block", "remove_rows", "remove_columns"):
            require(self, setting, getattr(self, setting) >= 0, "be at least 0")
        if self.shared not in SHARED:
            raise unknown("CubistMerge shared", self.shared, SHARED)

    def check(self, shape: ViTShape) -> None:
        super().check(shape)
        within = f"lie within the {shape.depth} blocks 0..{shape.depth - 1}"
        require(self, "block", self.block < shape.depth, within)
        for setting, side in zip(("remove_rows", "remove_columns"), shape.grid, strict=True):
            name = setting.removeprefix("remove_")
            fits = getattr(self, setting) <= side // 2
            require(self, setting, fits, f"be at most half of the grid's {side} {name}")

    def at_keep_rate(self, keep_rate: float | tuple[float, ...]) -> Reducer:
        raise InputError(
            "CubistMerge has no keep rate: expected remove_rows and remove_columns; "
            f"got {keep_rate}"
        )

    def variants(self, shape: ViTShape) -> Sequence[Reducer]:
        sides = [(step // 2, step - step // 2) for step in range(1, 2 * (min(shape.grid) // 2) + 1)]
        return [dataclasses.replace(self, remove_rows=r, remove_columns=c) for r, c in sides]

    def grid(self, shape: ViTShape) -> tuple[int, int]:
        """Rows and columns that are left."""
        rows, columns = shape.grid
        return rows - self.remove_rows, columns - self.remove_columns

    def block_plan(self, layer: int, n: int, shape: ViTShape) -> BlockPlan:
        rows, columns = self.grid(shape)
        m = rows * columns if layer == self.block else n
        return BlockPlan(m, m, m)

    def macs(self, layer: int, n: int, shape: ViTShape) -> int:
        if layer != self.block:
            return 0
        (rows, columns), (_, narrow) = shape.grid, self.grid(shape)
        # The cosines of neighbours.
        pairs = rows * (columns - 1) if self.remove_columns else 0
        pairs += narrow * (rows - 1) if self.remove_rows else 0
        return pairs * shape.width

    def before_block(self, state: TokenState, context: BlockContext) -> TokenState:
        if not self.acts(context.layer, state.count, context.shape):
            return state
        (rows, columns), narrow = context.shape.grid, self.grid(context.shape)[1]
        if self.remove_columns:
            state = merge_rows(state, (rows, columns), self.remove_columns, self.shared)
        if self.remove_rows:
            state = merge_columns(state, (rows, narrow), self.remove_rows, self.shared)
        return state


def merge_rows(state: TokenState, grid: tuple[int, int], r: int, shared: str) -> TokenState:
    """A grid of tokens whose rows have each lost `r`."""
    (rows, columns), (b, _, d) = grid, state.tokens.shape
    lines = state.tokens.reshape(b * rows, columns, d)
    merged, route = merge_lines(lines, r, shared)
    route = route.reshape(b, rows, columns) + (columns - r) * jnp.arange(rows)[:, None]
    return _replaced(state, merged.reshape(b, -1, d), route.reshape(b, -1))


def merge_columns(state: TokenState, grid: tuple[int, int], r: int, shared: str) -> TokenState:
    """A grid of tokens whose columns have each lost `r`."""
    (rows, columns), (b, _, d) = grid, state.tokens.shape
    lines = state.tokens.reshape(b, rows, columns, d).swapaxes(1, 2)
    merged, route = merge_lines(lines.reshape(b * columns, rows, d), r, shared)
    merged = merged.reshape(b, columns, rows - r, d).swapaxes(1, 2)
    route = route.reshape(b, columns, rows).swapaxes(1, 2) * columns + jnp.arange(columns)
    return _replaced(state, merged.reshape(b, -1, d), route.reshape(b, -1))


def _replaced(
    state: TokenState, tokens: Float[Array, "b m d"], route: Int[Array, "b n"]
) -> TokenState:
    """The state with tokens that stand for one patch or, merged, for several."""
    state = state.replace_tokens(tokens, route, jnp.zeros(tokens.shape[:2], jnp.int32))
    return state.replace(kind=jnp.where(state.size > 1, TokenKind.MATCHED, TokenKind.KEPT))


def merge_lines(
    lines: Float[Array, "l n d"], r: int, shared: str
) -> tuple[Float[Array, "l m d"], Int[Array, "l n"]]:
    """Lines of tokens of which `r` at odd places have joined a neighbour.

    Returns:
      What is left, in order, and for each token the place of what stands for it.
    """
    n = lines.shape[1]
    even, odd = lines[:, ::2], lines[:, 1::2]
    similarity, backward = closer_neighbour(lines)
    rank = inverse_index(argtopk(similarity, n // 2), n // 2)
    gone = rank < r
    # Of the token at an even place what stands behind it, and before it.
    extra = even.shape[1] - odd.shape[1]
    behind = gone & backward
    ahead = gone & ~backward
    behind = jnp.pad(behind, ((0, 0), (0, extra)))
    ahead = jnp.pad(ahead, ((0, 0), (1, 0)))[:, : even.shape[1]]
    after = jnp.pad(odd, ((0, 0), (0, extra), (0, 0)))
    before = jnp.pad(odd, ((0, 0), (1, 0), (0, 0)))[:, : even.shape[1]]
    if shared == "last":
        written = rank + n * (rank % 2)
        later = jnp.pad(written, ((0, 0), (0, extra)))
        earlier = jnp.pad(written, ((0, 0), (1, 0)))[:, : even.shape[1]]
        both, wins = behind & ahead, later > earlier
        behind, ahead = behind & ~(both & ~wins), ahead & ~(both & wins)
    even = larger(larger(even, before, ahead), after, behind)
    tokens = interleave(even, odd)
    stays = interleave(jnp.ones_like(behind), ~gone)
    index = argtopk(stays.astype(jnp.float32), n - r)  # stable: in order of place
    place = jnp.arange(1, n, 2)
    target = jnp.where(gone, jnp.where(backward, place - 1, place + 1), place)
    own = jnp.broadcast_to(jnp.arange(0, n, 2), even.shape[:2])
    route = gather_tokens(jnp.cumsum(stays, axis=1) - 1, interleave(own, target))
    return gather_tokens(tokens, index), route


def closer_neighbour(
    lines: Float[Array, "l n d"],
) -> tuple[Float[Array, "l o"], Bool[Array, "l o"]]:
    """The cosine of each token at an odd place and its closer neighbour; if that is before it."""
    direction = unit(lines)
    cosine = (direction[:, :-1] * direction[:, 1:]).sum(axis=-1)
    before, behind = cosine[:, ::2], cosine[:, 1::2]
    missing = before.shape[1] - behind.shape[1]
    behind = jnp.pad(behind, ((0, 0), (0, missing)), constant_values=-jnp.inf)
    return jnp.maximum(before, behind), before >= behind


def larger(
    x: Float[Array, "l n d"], y: Float[Array, "l n d"], joins: Bool[Array, "l n"]
) -> Float[Array, "l n d"]:
    """Where a token joins, the value of larger magnitude of the two, channel by channel."""
    return jnp.where(joins[..., None] & (jnp.abs(y) > jnp.abs(x)), y, x)


def interleave(even: Array, odd: Array) -> Array:
    """A line of what stands at its even places and what stands at its odd ones."""
    n = even.shape[1] + odd.shape[1]
    gap = [(0, 0)] * odd.ndim
    gap[1] = (0, even.shape[1] - odd.shape[1])
    both = jnp.stack([even, jnp.pad(odd, gap)], axis=2)
    return both.reshape(even.shape[0], -1, *even.shape[2:])[:, :n]
