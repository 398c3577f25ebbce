"""The contract between a vision transformer and a method that reduces its tokens.

A reducer is an immutable description of one method: its settings, the token counts that follow
from them, and hooks that the transformer calls on its way through the blocks:

    before_block -> attention (key_weight) -> after_attention -> MLP -> after_block, ..., finish

Each hook is a pure function from a `TokenState` to a `TokenState`. Counts come from
`block_plan`, in Python integers, before anything is traced. A method knows no transformer, the
transformer no method. Learned methods own a tree of weights (`init`), which the transformer
stores under `reducer` and hands back with every `BlockContext`. Methods with a schedule by stages
share `StageReducer`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float

from tdm_jax.errors import InputError
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
      pool: what the head reads: the class "token", "avg" for the mean of the patches, "map" for all
        tokens by a query of its own, "token_avg" for the first two.
    """

    grid: tuple[int, int]
    depth: int
    width: int
    num_heads: int
    prefix: int = 1
    class_token: bool = True
    pool: str = "token"

    @property
    def patches(self) -> int:
        """How many patches the grid has."""
        return self.grid[0] * self.grid[1]


class BlockPlan(NamedTuple):
    """Patch tokens (prefix not counted) that enter a block's attention and MLP, and leave it."""

    attention: int
    mlp: int
    out: int


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

    def map(self) -> Float[Array, "b h t t"]:
        """Softmax of all queries over all keys, prefix included."""

    def inputs(self) -> Float[Array, "b n d"]:
        """The patch tokens as the attention reads them: behind the block's first norm."""


@runtime_checkable
class Preview(Protocol):
    """A look at a block's attention before the block."""

    def __call__(self, state: TokenState) -> Attention:
        """What the block's attention would see of these tokens, by the block's own weights.

        Of the answers only those that queries and keys decide. Costs a norm and their two linear
        maps, beside what is asked for.
        """


@runtime_checkable
class Pooling(Protocol):
    """What the head of a model will look for."""

    def __call__(self, tokens: Float[Array, "b n d"]) -> Float[Array, "b h n"]:
        """Softmax over these tokens, before the final norm, of the pooling head's query."""


class BlockContext(struct.PyTreeNode):
    """Where in the network a hook is called, and with what.

    Attributes:
      layer: the block, from 0.
      shape: the transformer's.
      train: whether this is a training forward pass.
      weights: the method's own learned weights, {} if it has none.
      key: randomness for this block; None where the caller gave none.
      pass_key: the same in every block of a forward pass.
      attention: the block's own, for `after_attention`; None before, and where the method gave the
        map.
      preview: a look at the block's attention, for `before_block`.
      update: what the block's MLP adds to each patch token, for `after_block`; None before.
      pooling: the head's, where it attends to the tokens; None elsewhere.
    """

    layer: int = struct.field(pytree_node=False)
    shape: ViTShape = struct.field(pytree_node=False)
    train: bool = struct.field(pytree_node=False)
    weights: Weights
    key: Any = None
    pass_key: Any = None
    attention: Attention | None = None
    preview: Preview | None = struct.field(pytree_node=False, default=None)
    update: Float[Array, "b n d"] | None = None
    pooling: Pooling | None = None


@struct.dataclass
class KeyMask:
    """Keys that a block's attention may look at, such that a gradient also reaches the hidden ones.

    Attributes:
      mask: 1 for a key that all queries see, 0 for one that only its own query sees; over prefix
        and patch tokens. A straight-through mask passes its gradient on.
    """

    mask: Float[Array, "b t"]


@struct.dataclass
class AttentionMap:
    """Who looks at whom in a block, over prefix and patch tokens, instead of what it would compute.

    Queries and keys are then not needed: the block computes values alone.
    """

    map: Float[Array, "b h t t"]


@runtime_checkable
class Probe(Protocol):
    """What a transformer with its weights does to the images of a calibration."""

    @property
    def shape(self) -> ViTShape:
        """The transformer's."""

    def token_counts(self, reducer: "Reducer", quantile: float) -> tuple[int, ...]:
        """So many tokens that a share `quantile` of the images has no more, at least 1.

        Behind each block where the reducer acts (`Reducer.acts`).
        """

    def change(
        self, layer: int, useful: Bool[np.ndarray, " p"], seen: Bool[np.ndarray, "m p"]
    ) -> Float[np.ndarray, " m"]:
        """How much what a block adds to some tokens changes when it sees only some patches.

        Args:
          layer: the block.
          useful: the patches whose output counts, beside the prefix.
          seen: one set of patches for each answer.

        Returns:
          The change's norm, relative to that of what is added when all are seen.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reducer:
    """A method that changes nothing: each hook passes the tokens on (`"none"`)."""

    # Whether the method has weights of its own that must be trained or loaded.
    learned: ClassVar[bool] = False
    # Whether it goes by what the class token shows.
    needs_class_token: ClassVar[bool] = False

    @property
    def title(self) -> str:
        """What error messages call the method."""
        return type(self).__name__

    def block_plan(self, layer: int, n: int, shape: ViTShape) -> BlockPlan:
        """How many of the `n` patch tokens that reach a block go through its parts."""
        return BlockPlan(n, n, n)

    def acts(self, layer: int, n: int, shape: ViTShape) -> bool:
        """Whether the block changes the source map of the `n` patch tokens that reach it."""
        return self.block_plan(layer, n, shape) != (n, n, n)

    def check(self, shape: ViTShape) -> None:
        """Raises InputError if the method does not fit a transformer of this shape."""
        if self.needs_class_token and not shape.class_token:
            raise InputError(f"{self.title}: expected a class token to go by; the model has none")

    @property
    def adaptive(self) -> bool:
        """Whether images differ in how many tokens they keep."""
        return False

    @property
    def draws(self) -> bool:
        """Whether chance has a say in inference; a key in `rngs` then decides, or a seed."""
        return False

    @property
    def has_losses(self) -> bool:
        """Whether training asks for the method's `losses`, and makes `Info` for them."""
        return self.learned

    @property
    def rewrites_prefix(self) -> bool:
        """Whether the prefix that the head reads is another than the last block makes of it.

        If not, a model whose head reads nothing else computes nothing else there.
        """
        return False

    @property
    def calibrates(self) -> bool:
        """Whether the method leaves something open that `calibrated` can fix."""
        return self.adaptive

    def at_keep_rate(self, keep_rate: float | tuple[float, ...]) -> "Reducer":
        """The same method at another keep rate.

        Raises:
          InputError: the method has no keep rate, or none of that value.
        """
        raise InputError(f"{self.title} has no keep rate; got {keep_rate}")

    def variants(self, shape: ViTShape) -> Sequence["Reducer"]:
        """The same method by the setting that decides its cost, from much to little.

        Raises:
          InputError: the method has no such setting.
        """
        raise InputError(f"{self.title} has no setting that decides its cost")

    def warmed_up(self, share: float) -> "Reducer":
        """The method on its way from no reduction, at a share of 0, to itself, at 1.

        Raises:
          InputError: the method has no keep rate, or one that does not decide its counts.
        """
        raise InputError(f"{self.title} has no keep rate to warm up; got a share of {share:g}")

    def calibrated(self, probe: Probe, quantile: float) -> "Reducer":
        """The method with what it leaves open fixed by what a transformer does to some images.

        Args:
          probe: asks the transformer.
          quantile: share of the images whose tokens all find a slot, block by block, where that is
            what is open.

        Raises:
          InputError: the method leaves nothing open.
        """
        raise InputError(
            f"{self.title} keeps as many tokens of every image; expected an adaptive method to "
            "calibrate, such as ats, avit or psvit"
        )

    def macs(self, layer: int, n: int, shape: ViTShape) -> int:
        """Multiply-adds that the method itself adds to a block which `n` patch tokens reach.

        By torchprofile's convention, see `tdm_jax.analysis.costs`.
        """
        return 0

    def init(self, key: Array, shape: ViTShape) -> Weights:
        """Fresh weights of a learned method."""
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
        return state

    def key_weight(
        self, state: TokenState, context: BlockContext
    ) -> Float[Array, "b t"] | KeyMask | AttentionMap | None:
        """Factor of each key in the block's softmax, over prefix and patch tokens; None for 1.

        `softmax_j = w_j exp(l_ij) / sum_j w_j exp(l_ij)`: 0 masks a token, its size gives ToMe's
        proportional attention. A `KeyMask` is for masks that are being learned, an
        `AttentionMap` for a method that has the whole softmax already.
        """
        return None

    def qkv_update(self, context: BlockContext) -> Float[Array, "d 3*d"] | None:
        """What a method's weights add to the kernel of the block's queries, keys and values."""
        return None

    def folded(self) -> "Reducer":
        """What is left of the method once `qkv_update` is part of the model's kernels."""
        return self

    def after_attention(self, state: TokenState, context: BlockContext) -> TokenState:
        """Called after the attention's residual, before the MLP."""
        return state

    def after_block(self, state: TokenState, context: BlockContext) -> TokenState:
        """Called on the tokens that leave a block."""
        return state

    def finish(self, state: TokenState, shape: ViTShape) -> TokenState:
        """Called once, after the last block and before the final norm."""
        return state

    def of_teacher(self) -> "Reducer":
        """What reduces the tokens of a model that teaches one with this method.

        Teacher and student draw from the same key.
        """
        return Reducer()

    def losses(self, info: Any, logits: Any, labels: Any, teacher: Any = None) -> dict[str, Array]:
        """Named scalar losses that a method adds to the training objective, if `has_losses`.

        Args:
          info: `Info` of the training forward pass.
          logits: its answer [b, c].
          labels: target distributions [b, c].
          teacher: what the teacher says to the same images, as the pair (logits, `Info`); None
            where training has none. It receives no gradient.
        """
        return {}


def require(owner: Any, setting: str, valid: bool, expected: str, title: str = "") -> None:
    """Raises InputError, with what a setting of `owner` must be and what it is, unless `valid`.

    A part is none that users know: it speaks in the name of a method, its `title`.
    """
    if not valid:
        name = title or owner.title
        raise InputError(f"{name}: {setting} must {expected}; got {getattr(owner, setting)}")


def plan(reducer: Reducer, shape: ViTShape) -> tuple[BlockPlan, ...]:
    """The token counts of every block: the schedule, in Python integers."""
    blocks, n = [], shape.patches
    for layer in range(shape.depth):
        blocks.append(reducer.block_plan(layer, n, shape))
        n = blocks[-1].out
    return tuple(blocks)
