"""Fixes on data what a method with an adaptive count leaves open, once, for fast inference.

ATS and A-ViT keep as many tokens of an image as it needs, with static shapes by a mask over the
largest possible count; calibration gives them as many slots as are needed, block by block. PS-ViT's
sets of patches are found here altogether. What to ask of the transformer the method knows, how to
ask it this module does.

The result is a reducer, a plain description: `describe_reducer` turns it into what JSON can hold
beside a checkpoint, `make_reducer(**description)` back.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from tdm_jax.errors import InputError
from tdm_jax.models.block import Block
from tdm_jax.models.vit import VisionTransformer
from tdm_jax.reduction import BlockContext, Reducer, ViTShape
from tdm_jax.reduction.token_state import TokenState

Batches = Iterable[Float[Array, "b h w c"]]


def calibrate(
    model: VisionTransformer, variables: PyTree, batches: Batches, *, quantile: float = 0.9
) -> Reducer:
    """Fixes what a model's reducer leaves open.

    Args:
      model: with the reducer in question.
      variables: of the model.
      batches: normalised images, as the model takes them. PS-ViT holds all of them in memory.
      quantile: share of the images whose tokens all find a slot, for each block by itself. 1 makes
        the result exact on these images; less is faster. PS-ViT has its tolerance instead.

    Returns:
      The same method with fixed counts per block: `model.clone(reducer=...)`.

    Raises:
      InputError: the reducer leaves nothing open, there are no images, or the quantile lies
        outside (0, 1].
    """
    if not 0 < quantile <= 1:
        raise InputError(f"quantile must be in (0, 1]; got {quantile}")
    return model.reducer.calibrated(ModelProbe(model, variables, batches), quantile)


@dataclasses.dataclass(frozen=True)
class ModelProbe:
    """Runs a transformer on the images of a calibration: a `Probe`.

    Attributes:
      model: with any reducer.
      variables: of the model.
      batches: normalised images, which are read once.
    """

    model: VisionTransformer
    variables: PyTree
    batches: Batches

    @property
    def shape(self) -> ViTShape:
        """The transformer's."""
        return self.model.shape

    def token_counts(self, reducer: Reducer, quantile: float) -> tuple[int, ...]:
        """See `Probe`."""
        model = self.model.clone(reducer=reducer)

        def counts(images: Array) -> list[Array]:
            output: Any = model.apply(self.variables, images, return_info=True)
            return [(stage.size > 0).sum(axis=-1) for stage in output[1].stages]

        # The "higher" method: a count that enough images stay within, not one between two counts.
        return tuple(
            max(1, int(np.quantile(count, quantile, method="higher")))
            for count in self._on_all(counts)
        )

    def change(
        self, layer: int, useful: Bool[np.ndarray, " p"], seen: Bool[np.ndarray, "m p"]
    ) -> Float[np.ndarray, " m"]:
        """See `Probe`."""
        name = f"blocks_{layer}"
        weights = self.variables["params"][name]
        return np.asarray(_change(self.model, weights, self._block_inputs[name], useful, seen))

    @functools.cached_property
    def _block_inputs(self) -> dict[str, Float[np.ndarray, "b t d"]]:
        recording = self.model.clone(reducer=_Record())
        run: Any = functools.partial(recording.apply, self.variables, return_info=True)
        return self._on_all(lambda images: run(images)[1].carry)

    def _on_all(self, function: Callable[[Array], PyTree]) -> PyTree:
        parts = [jax.device_get(part) for part in map(jax.jit(function), self.batches)]
        if not parts:
            raise InputError("calibration needs at least one batch of images; got none")
        return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Record(Reducer):
    """Carries what enters each block to the end."""

    def before_block(self, state: TokenState, context: BlockContext) -> TokenState:
        return state.replace(carry={**state.carry, f"blocks_{context.layer}": state.sequence()})


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Hide(Reducer):
    """Hides the patches that are not valid from the attention."""

    def key_weight(self, state: TokenState, context: BlockContext) -> Float[Array, "b t"]:
        valid: Any = state.valid
        return jnp.pad(valid, ((0, 0), (context.shape.prefix, 0)), constant_values=1.0)


@functools.partial(jax.jit, static_argnums=0)
def _change(
    model: VisionTransformer,
    weights: PyTree,
    tokens: Float[Array, "b t d"],
    useful: Bool[Array, " p"],
    seen: Bool[Array, "m p"],
) -> Float[Array, " m"]:
    shape = model.shape
    block = Block(model.block_spec, _Hide())
    context = BlockContext(layer=0, shape=shape, train=False, weights={})
    state = TokenState.start(tokens[:, : shape.prefix], tokens[:, shape.prefix :])
    rows = jnp.pad(useful, (shape.prefix, 0), constant_values=True)[:, None]

    def added(seen: Bool[Array, " p"]) -> Float[Array, "b t d"]:
        valid = jnp.broadcast_to(seen.astype(jnp.float32), state.assign.shape)
        out: Any = block.apply({"params": weights}, state.replace(valid=valid), context)
        return jnp.where(rows, (out.sequence() - tokens).astype(jnp.float32), 0.0)

    whole = added(jnp.ones(shape.patches, bool))

    def relative(seen: Bool[Array, " p"]) -> Float[Array, ""]:
        return jnp.linalg.norm((added(seen) - whole).ravel()) / jnp.linalg.norm(whole.ravel())

    return jax.lax.map(relative, seen)
