"""The contract between a vision transformer and a method that reduces its tokens.

A reducer is an immutable description of one method: its settings, the token counts that follow
from them, and hooks that the transformer calls on its way through the blocks:

    before_block -> attention (key_weight) -> after_attention -> MLP -> after_block, ..., finish

Each hook is a pure function from a `TokenState` to a `TokenState`. Counts come from
`block_plan`, in Python integers, before anything is traced. A method knows no transformer, the
transformer no method. Learned methods own a tree of weights (`init`), which the transformer
stores under `reducer` and hands back with every `Step`.
"""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from tdm_jax.errors import InputError, unknown
from tdm_jax.reduction.schedules import RAMPS, removals
from tdm_jax.reduction.token_state import TokenState

Weights = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ViTShape:
    """What a method may know of the transformer it works in.

    Attributes:
      grid: rows and columns of patches.
      depth: number of blocks.
      width: channels of a token.
      num_heads: attention heads.
      prefix: class, distillation and register tokens.
      class_token: whether the first prefix token is a class token.
    """

    grid: tuple[int, int]
    depth: int
    width: int
    num_heads: int
    prefix: int = 1
    class_token: bool = True

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]


class BlockPlan(NamedTuple):
    """Patch tokens (prefix not counted) that enter a block's attention and MLP, and leave it."""

    attention: int
    mlp: int
    out: int


@struct.dataclass
class BlockContext:
    """Where in the network a hook is called, and with what.

    Attributes:
      layer: the block, from 0.
      shape: the transformer's.
      train: whether this is a training forward pass.
      weights: the method's own learned weights, {} if it has none.
      key: randomness for this block; None where the caller gave none.
    """

    layer: int = struct.field(pytree_node=False)
    shape: ViTShape = struct.field(pytree_node=False)
    train: bool = struct.field(pytree_node=False)
    weights: Weights
    key: Any = None


@struct.dataclass
class KeyMask:
    """Keys that a block's attention may look at, such that a gradient also reaches the hidden ones.

    Attributes:
      mask: 1 for a key that all queries see, 0 for one that only its own query sees; over prefix
        and patch tokens. A straight-through mask passes its gradient on.
    """

    mask: Float[Array, "b t"]


@runtime_checkable
class Attention(Protocol):
    """What a block's attention can tell. Each is computed only if a method asks for it."""

    def class_row(self) -> Float[Array, "b h n"]:
        """Softmax over all keys of the class token's query, restricted to the patch tokens."""

    def received(self) -> Float[Array, "b n"]:
        """Attention that each patch token receives, summed over heads and all queries."""

    def keys(self) -> Float[Array, "b n h k"]:
        """The patch tokens' keys."""

    def values(self) -> Float[Array, "b n h k"]:
        """The patch tokens' values."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reducer:
    """A method that changes nothing: each hook passes the tokens on (`"none"`)."""

    # Whether the method has weights of its own that must be trained or loaded.
    learned: ClassVar[bool] = False

    @property
    def title(self) -> str:
        """What error messages call the method."""
        return type(self).__name__

    def block_plan(self, layer: int, n: int, shape: ViTShape) -> BlockPlan:
        """How many of the `n` patch tokens that reach a block go through its parts."""
        del layer, shape
        return BlockPlan(n, n, n)

    def acts(self, layer: int, n: int, shape: ViTShape) -> bool:
        """Whether the block changes the source map of the `n` patch tokens that reach it."""
        return self.block_plan(layer, n, shape) != (n, n, n)

    def check(self, shape: ViTShape) -> None:
        """Raises InputError if the method does not fit a transformer of this shape."""

    @property
    def adaptive(self) -> bool:
        """Whether images differ in how many tokens they keep."""
        return False

    def with_counts(self, counts: dict[int, int]) -> "Reducer":
        """An adaptive method with as many slots for patch tokens as `counts` says.

        Args:
          counts: slots that leave each block which changes the source map (`acts`).
        """
        raise InputError(f"{self.title} keeps as many tokens of every image; got {counts}")

    def macs(self, layer: int, n: int, shape: ViTShape) -> int:
        """Multiply-adds that the method itself adds to a block which `n` patch tokens reach.

        By torchprofile's convention, see `tdm_jax.analysis.costs`.
        """
        del layer, n, shape
        return 0

    def init(self, key: Array, shape: ViTShape) -> Weights:
        """Fresh weights of a learned method."""
        del key, shape
        return {}

    def import_weights(self, arrays: dict[str, np.ndarray]) -> Weights:
        """The method's weights from arrays with the names of its original program."""
        if arrays:
            raise InputError(
                f"{self.title} has no weights of its own; got {', '.join(sorted(arrays))}"
            )
        return {}

    def before_block(self, state: TokenState, context: BlockContext) -> TokenState:
        """Called on the tokens before a block."""
        del context
        return state

    def key_weight(
        self, state: TokenState, context: BlockContext
    ) -> Float[Array, "b t"] | KeyMask | None:
        """Factor of each key in the block's softmax, over prefix and patch tokens; None for 1.

        `softmax_j = w_j exp(l_ij) / sum_j w_j exp(l_ij)`: 0 masks a token, its size gives ToMe's
        proportional attention. A `KeyMask` is for masks that are being learned.
        """
        del state, context
        return None

    def after_attention(
        self, state: TokenState, context: BlockContext, attention: Attention
    ) -> TokenState:
        """Called after the attention's residual, before the MLP."""
        del context, attention
        return state

    def after_block(self, state: TokenState, context: BlockContext) -> TokenState:
        """Called on the tokens that leave a block."""
        del context
        return state

    def finish(self, state: TokenState, shape: ViTShape) -> TokenState:
        """Called once, after the last block and before the final norm."""
        del shape
        return state

    def losses(self, info: Any, logits: Any, labels: Any, teacher: Any = None) -> dict[str, Array]:
        """Named scalar losses that a learned method adds to the training objective.

        Args:
          info: `Info` of the training forward pass.
          logits: its answer [b, c].
          labels: target distributions [b, c].
          teacher: what the unreduced model says to the same images, as the pair (logits, `Info`);
            None where training has no teacher. It receives no gradient.
        """
        del info, logits, labels, teacher
        return {}


def ceil(value: float) -> int:
    """The ceiling, with 0.7 * 10 counted as 7 (TDM.md)."""
    return math.ceil(value - 1e-9)


def plan(reducer: Reducer, shape: ViTShape) -> tuple[BlockPlan, ...]:
    """The token counts of every block: the schedule, in Python integers."""
    blocks, n = [], shape.patches
    for layer in range(shape.depth):
        blocks.append(reducer.block_plan(layer, n, shape))
        n = blocks[-1].out
    return tuple(blocks)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageReducer(Reducer):
    """A method that reduces at a few stages, by a schedule.

    Attributes:
      keep_rate: share of the patch tokens that leaves a stage, in (0, 1]; one for all stages, or
        one for each.
      layers: the blocks with a stage, from 0, ascending; None for every block.
      counts: patch tokens that leave each stage, instead of what follows from the keep rate.
      r: patch tokens that a stage removes, instead of the keep rate; one number for all stages, or
        one for each. A stage never removes the last token.
      ramp: how an `r` for all stages is spread: "constant", "decreasing" from 2r to 0, or
        "increasing" from 0 to 2r.
      round_to: counts are rounded up to a multiple of this, for hardware tiles.
    """

    keep_rate: float | tuple[float, ...] = 0.7
    layers: tuple[int, ...] | None = (3, 6, 9)
    counts: tuple[int, ...] | None = None
    r: int | tuple[int, ...] | None = None
    ramp: str = "constant"
    round_to: int = 1

    # Whether a stage stands before its block, or between the block's attention and MLP.
    before: ClassVar[bool] = False

    def __post_init__(self) -> None:
        name = self.title
        for field in ("layers", "keep_rate", "counts", "r"):
            value = getattr(self, field)
            if value is not None and not isinstance(value, (int, float)):
                object.__setattr__(self, field, tuple(value))
        layers = self.layers
        if layers is not None and (
            list(layers) != sorted(set(layers)) or min(layers, default=0) < 0
        ):
            raise InputError(f"{name}: layers must be ascending block indices from 0; got {layers}")
        if layers is not None:
            self._check_lengths(len(layers))
        for rate in self.rates:
            if not 0 < rate <= 1:
                raise InputError(f"{name}: keep_rate must be in (0, 1]; got {rate}")
        if self.counts is not None and self.r is not None:
            raise InputError(
                f"{name}: expected counts or r, not both; got counts={self.counts}, r={self.r}"
            )
        if self.counts is not None and (
            list(self.counts) != sorted(self.counts, reverse=True)
            or min(self.counts, default=1) < 1
        ):
            raise InputError(
                f"{name}: counts must be at least 1 and must not rise; got {self.counts}"
            )
        if self.r is not None and np.min(self.r, initial=0) < 0:
            raise InputError(f"{name}: r must be at least 0; got {self.r}")
        if self.ramp not in RAMPS:
            raise unknown(f"{name} ramp", self.ramp, RAMPS)
        if self.round_to < 1:
            raise InputError(f"{name}: round_to must be at least 1; got {self.round_to}")

    def _check_lengths(self, stages: int) -> None:
        for field in ("keep_rate", "counts", "r"):
            value = getattr(self, field)
            if isinstance(value, tuple) and len(value) != stages:
                raise InputError(
                    f"{self.title}: {field} must have one number for each of the "
                    f"{stages} layers; got {len(value)}"
                )

    @property
    def rates(self) -> tuple[float, ...]:
        """The keep rate of each stage; only one where all are the same and every block is one."""
        if isinstance(self.keep_rate, tuple):
            return self.keep_rate
        return (float(self.keep_rate),) * (1 if self.layers is None else len(self.layers))

    @property
    def by_rate(self) -> bool:
        """Whether the keep rate decides the counts."""
        return self.counts is None and self.r is None

    def rate(self, stage: int) -> float:
        """The keep rate of a stage."""
        return self.keep_rate[stage] if isinstance(self.keep_rate, tuple) else self.keep_rate

    def of_start(self, stage: int, patches: int) -> int:
        """`floor(patches * k_0 * ... * k_stage)`: the count of methods that go by the start."""
        rate = math.prod(self.rate(i) for i in range(stage + 1))
        return math.floor(patches * rate + 1e-9)

    def stages(self, shape: ViTShape) -> tuple[int, ...]:
        """The blocks with a stage."""
        return tuple(range(shape.depth)) if self.layers is None else self.layers

    def check(self, shape: ViTShape) -> None:
        name, layers = self.title, self.stages(shape)
        if layers and layers[-1] >= shape.depth:
            raise InputError(
                f"{name}: layers {layers} must lie within the {shape.depth} "
                f"blocks 0..{shape.depth - 1}; pass layers=(...)"
            )
        self._check_lengths(len(layers))
        if self.counts and self.counts[0] > shape.patches:
            raise InputError(
                f"{name}: counts must be at most the {shape.patches} patches; got {self.counts[0]}"
            )
        if self.r is not None and np.max(self.r, initial=0) >= shape.patches:
            raise InputError(f"{name}: r must be below the {shape.patches} patches; got {self.r}")

    def count(self, stage: int, n: int, patches: int) -> int:
        """Tokens that leave a stage by its keep rate, before rounding, of the n that reach it."""
        raise NotImplementedError

    def stage_count(self, stage: int, n: int, shape: ViTShape) -> int:
        """Tokens that leave a stage of the n that reach it."""
        if self.counts is not None:
            count = self.counts[stage]
        elif self.r is not None:
            count = n - removals(self.r, self.ramp, len(self.stages(shape)))[stage]
        else:
            count = self.count(stage, n, shape.patches)
        count = min(max(count, 1), n)
        return min(-(-count // self.round_to) * self.round_to, n)

    def block_plan(self, layer: int, n: int, shape: ViTShape) -> BlockPlan:
        if layer not in self.stages(shape):
            return BlockPlan(n, n, n)
        m = self.stage_count(self.stages(shape).index(layer), n, shape)
        return BlockPlan(m if self.before else n, m, m)

    def reduce(
        self, state: TokenState, context: BlockContext, attention: Attention | None
    ) -> TokenState:
        """One stage that leaves fewer tokens than reach it.

        `attention` is the block's own, None for a stage before its block.
        """
        raise NotImplementedError

    def stage(self, context: BlockContext) -> int:
        """Which stage a hook in a reducing block belongs to."""
        return self.stages(context.shape).index(context.layer)

    def _reduces(self, state: TokenState, context: BlockContext) -> bool:
        stages = self.stages(context.shape)
        return context.layer in stages and (
            self.stage_count(self.stage(context), state.count, context.shape) < state.count
        )

    def before_block(self, state: TokenState, context: BlockContext) -> TokenState:
        if self.before and self._reduces(state, context):
            return self.reduce(state, context, None)
        return state

    def after_attention(
        self, state: TokenState, context: BlockContext, attention: Attention
    ) -> TokenState:
        if not self.before and self._reduces(state, context):
            return self.reduce(state, context, attention)
        return state


def random_key(context: BlockContext, seed: int) -> Array:
    """This block's randomness: the caller's if it gave any, else fixed by `seed` and the block."""
    return (
        context.key
        if context.key is not None
        else jax.random.fold_in(jax.random.key(seed), context.layer)
    )
