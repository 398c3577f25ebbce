"""Fixes on data what a method with an adaptive count leaves open, once, for fast inference.

ATS and A-ViT keep as many tokens of an image as it needs, with static shapes by a mask over the
largest possible count. `calibrate` measures how many are needed, block by block, and gives the
method that many slots. PS-ViT's sets of patches are found here altogether.

The result is a reducer, a plain description: `describe_reducer` turns it into what JSON can hold
beside a checkpoint, `make_reducer(**description)` back.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from tdm_jax.errors import InputError
from tdm_jax.models.vit import Block, VisionTransformer
from tdm_jax.reduction import BlockContext, Reducer
from tdm_jax.reduction.methods.psvit import PSViT, select
from tdm_jax.reduction.token_state import TokenState

Batches = Iterable[Float[Array, "b h w c"]]


def calibrate(
    model: VisionTransformer, params: Any, batches: Batches, *, quantile: float = 0.9
) -> Reducer:
    """Fixes the counts of a model's adaptive reducer.

    Args:
      model: with the reducer in question.
      params: of the model.
      batches: normalised images, as the model takes them. PS-ViT holds all of them in memory.
      quantile: share of the images whose tokens all find a slot, for each block by itself. 1 makes
        the result exact on these images; less is faster. PS-ViT has its tolerance instead.

    Returns:
      The same method with fixed counts per block: `model.clone(reducer=...)`.

    Raises:
      InputError: the reducer has no adaptive count, there are no images, or the quantile lies
        outside (0, 1].
    """
    reducer = model.reducer
    if not 0 < quantile <= 1:
        raise InputError(f"quantile must be in (0, 1]; got {quantile}")
    if isinstance(reducer, PSViT):
        return dataclasses.replace(reducer, sets=_sets(model, params, batches))
    if not reducer.adaptive:
        raise InputError(
            f"{type(reducer).__name__} keeps as many tokens of every image; expected an adaptive "
            "reducer to calibrate (ats, avit, psvit)"
        )
    # With room for all.
    exact = model.clone(reducer=dataclasses.replace(reducer, counts=None))

    @jax.jit
    def needed(images: Array) -> dict[int, Array]:
        _, info = exact.apply(params, images, return_info=True)
        return {stage.layer: (stage.size > 0).sum(axis=-1) for stage in info.stages}

    seen = _concatenate([jax.device_get(needed(images)) for images in batches])
    # The "higher" method: a count that enough images stay within, not one between two counts.
    slots = {
        layer: max(1, int(np.quantile(counts, quantile, method="higher")))
        for layer, counts in seen.items()
    }
    return reducer.with_counts(slots)


def _concatenate(parts: list[Any]) -> Any:
    if not parts:
        raise InputError("calibration needs at least one batch of images; got none")
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Record(Reducer):
    """Carries what enters each block to the end."""

    def before_block(self, state: TokenState, context: BlockContext) -> TokenState:
        return state.replace(carry={**state.carry, f"blocks_{step.layer}": state.sequence()})


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Hide(Reducer):
    """Hides the patches that are not valid from the attention."""

    def key_weight(self, state: TokenState, context: BlockContext) -> Float[Array, "b t"]:
        return jnp.pad(state.valid, ((0, 0), (context.shape.prefix, 0)), constant_values=1.0)


def _sets(model: VisionTransformer, params: Any, batches: Batches) -> tuple[tuple[int, ...], ...]:
    record = model.clone(reducer=_Record())
    enter = jax.jit(lambda images: record.apply(params, images, return_info=True)[1].carry)
    inputs = _concatenate([jax.device_get(enter(images)) for images in batches])
    change = jax.jit(functools.partial(_change, model))

    def of_layer(layer: int, useful: np.ndarray, kept: np.ndarray) -> np.ndarray:
        name = f"blocks_{layer}"
        return np.asarray(change(params["params"][name], inputs[name], useful, kept))

    shape = model.shape
    return select(of_layer, shape.depth, shape.patches, model.reducer.tolerance)


def _change(
    model: VisionTransformer,
    weights: Any,
    tokens: Float[Array, "b t d"],
    useful: Bool[Array, "p"],
    kept: Bool[Array, "m p"],
) -> Float[Array, "m"]:
    """How much what a block adds to its useful tokens changes, for each set that it attends to."""
    shape = model.shape
    block = Block(
        num_heads=model.num_heads,
        mlp_hidden=int(model.width * model.mlp_ratio),
        layer_norm_eps=model.layer_norm_eps,
        drop_path=0.0,
        reducer=_Hide(),
        dtype=model.dtype,
    )
    context = BlockContext(layer=0, shape=shape, train=False, weights={})
    start = TokenState.start(tokens[:, : shape.prefix], tokens[:, shape.prefix :])
    rows = jnp.pad(useful, (shape.prefix, 0), constant_values=True)[:, None]

    def added(seen: Bool[Array, "p"]) -> Float[Array, "b t d"]:
        valid = jnp.broadcast_to(seen.astype(jnp.float32), start.assign.shape)
        out = block.apply({"params": weights}, start.replace(valid=valid), context).sequence()
        return jnp.where(rows, (out - tokens).astype(jnp.float32), 0.0)

    whole = added(jnp.ones(shape.patches, bool))

    def relative(seen: Bool[Array, "p"]) -> Float[Array, ""]:
        return jnp.linalg.norm((added(seen) - whole).ravel()) / jnp.linalg.norm(whole.ravel())

    return jax.lax.map(relative, kept)
