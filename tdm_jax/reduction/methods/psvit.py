"""PS-ViT: Patch Slimming for Efficient Vision Transformers (Tang et al., CVPR 2022).

arXiv 2106.02852.

Which patches a block needs is decided once, for all images, on a calibration set, from the last
block backwards. Of the last block only the prefix tokens' output is useful. Given which output of a
block is useful, a patch that enters it is useful if it is useful at its exit, or if dropping it
changes the useful output by more than a tolerance. The index sets are nested and constant: the
transformer gathers by constants, and nothing is scored at run time.

`select` finds the sets for `tdm_jax.calibrate`. Many small changes can add up to a large one, so
patches are ranked by the change that each makes alone, and dropped from the least upwards for as
long as all that is dropped together stays within the tolerance (the paper grows the set by such a
rank until the error is within it; its fine-tuning of each block in between is left to training).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from tdm_jax.errors import InputError
from tdm_jax.reduction.contract import BlockContext, BlockPlan, Probe, Reducer, ViTShape, require
from tdm_jax.reduction.token_state import TokenState

Sets = tuple[tuple[int, ...], ...]
# Relative changes of a block's useful rows, one for each set of patches that stays.
Change = Callable[[int, Bool[np.ndarray, "p"], Bool[np.ndarray, "m p"]], Float[np.ndarray, "m"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PSViT(Reducer):
    """Keeps a fixed set of patches in every block, the same for all images.

    Attributes:
      sets: patches that enter the first block, then those that go on behind each block's attention;
        each ascending and part of the one before. None, before `tdm_jax.calibrate`, keeps all.
      tolerance: largest relative change of a block's useful output in the calibration.
    """

    needs_class_token: ClassVar[bool] = True

    sets: Sets | None = None
    tolerance: float = 0.05

    def __post_init__(self) -> None:
        require(self, "tolerance", 0 <= self.tolerance < 1, "be in [0, 1)")
        outer = None
        for i, kept in enumerate(self.sets or ()):
            if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0:
                raise InputError(
                    f"PSViT: set {i} must be ascending patch indices, at least one; got {kept}"
                )
            if outer is not None and not outer.issuperset(kept):
                raise InputError(
                    f"PSViT: set {i} must be part of the set before; got the others "
                    f"{sorted(set(kept) - outer)}"
                )
            outer = set(kept)

    def check(self, shape: ViTShape) -> None:
        super().check(shape)
        if shape.pool != "token":
            raise InputError(
                "PSViT: of the last block only the class token's output counts as useful, and the "
                f"model's head reads {shape.pool!r}; expected pool='token', or another method"
            )
        if self.sets is None:
            return
        if len(self.sets) != shape.depth + 1:
            raise InputError(
                f"PSViT: sets must be {shape.depth + 1}, one before and one in each of the "
                f"{shape.depth} blocks; got {len(self.sets)}"
            )
        if self.sets[0][-1] >= shape.patches:
            raise InputError(
                f"PSViT: sets must hold indices of the {shape.patches} patches; "
                f"got {self.sets[0][-1]}"
            )

    @property
    def calibrates(self) -> bool:
        return True

    def calibrated(self, probe: Probe, quantile: float) -> Reducer:
        # How much may go is what the tolerance says.
        shape = probe.shape
        sets = select(probe.change, shape.depth, shape.patches, self.tolerance)
        return dataclasses.replace(self, sets=sets)

    def block_plan(self, layer: int, n: int, shape: ViTShape) -> BlockPlan:
        if self.sets is None:
            return BlockPlan(n, n, n)
        enter, leave = len(self.sets[layer]), len(self.sets[layer + 1])
        return BlockPlan(enter, leave, leave)

    def before_block(self, state: TokenState, context: BlockContext) -> TokenState:
        if self.sets is None or context.layer > 0:
            return state
        return _gather(state, tuple(range(state.count)), self.sets[0])

    def after_attention(self, state: TokenState, context: BlockContext) -> TokenState:
        if self.sets is None:
            return state
        return _gather(state, self.sets[context.layer], self.sets[context.layer + 1])


def _gather(state: TokenState, have: tuple[int, ...], keep: tuple[int, ...]) -> TokenState:
    if have == keep:
        return state
    index = jnp.array([have.index(patch) for patch in keep])
    return state.select(jnp.broadcast_to(index, (state.tokens.shape[0], len(keep))))


def select(change: Change, depth: int, patches: int, tolerance: float) -> Sets:
    """Finds the sets from the last block backwards.

    Args:
      change: `change(layer, useful, kept)` is the relative change of the block's output, over the
        prefix and the `useful` patches, for each row of `kept`: the patches that its attention
        sees.
      depth: blocks.
      patches: their number.
      tolerance: largest relative change of a block's useful output.

    Returns:
      As `PSViT.sets`. The last set, of which nothing is used, is the one patch that matters most
      in the last block.
    """
    useful = np.zeros(patches, bool)
    sets: list[tuple[int, ...]] = []
    for layer in reversed(range(depth)):
        alone = change(layer, useful, ~np.eye(patches, dtype=bool))
        order = np.argsort(alone, kind="stable")
        candidates = order[~useful[order]]
        if not sets:
            sets.append((int(candidates[-1]),))
            candidates = candidates[:-1]
        of_layer = functools.partial(change, layer, useful)
        kept = _drop(of_layer, candidates, patches, tolerance)
        sets.append(tuple(np.flatnonzero(kept).tolist()))
        useful = kept
    return tuple(reversed(sets))


def _drop(
    change: Callable[[np.ndarray], np.ndarray], order: np.ndarray, patches: int, tolerance: float
) -> Bool[np.ndarray, "p"]:
    """Drops as many of the patches, in this order, as the tolerance allows, by bisection."""

    def without(count: int) -> np.ndarray:
        kept = np.ones(patches, bool)
        kept[order[:count]] = False
        return kept

    fits, fails = 0, len(order) + 1
    while fails - fits > 1:
        middle = (fits + fails) // 2
        if change(without(middle)[None])[0] <= tolerance:
            fits = middle
        else:
            fails = middle
    return without(fits)
