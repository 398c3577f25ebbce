"""The diversity score of "Beyond Attentive Tokens" (CVPR 2023), per block, over a data set.

`r(Z) = ||Z - 1 z^T||` in the entrywise l1 norm, with z the token of Z that minimises it:
`min_i sum_n sum_c |Z_nc - Z_ic|`. It is 0 where all tokens are equal.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from tdm_jax import data
from tdm_jax.analysis.candidate import BASELINE, Candidate, with_baselines
from tdm_jax.analysis.comparison import compare, silent
from tdm_jax.analysis.evaluation import Evaluation
from tdm_jax.analysis.fidelity import block_fidelity
from tdm_jax.analysis.results import UNKNOWN, Column, Result, markdown, significant
from tdm_jax.data import DataConfig
from tdm_jax.data.device_transforms import normalise
from tdm_jax.errors import InputError
from tdm_jax.models.block import Block
from tdm_jax.models.vit import VisionTransformer
from tdm_jax.parallel import sharding
from tdm_jax.reduction.token_state import TokenState


def diversity(
    tokens: Float[Array, "b n d"],
    valid: Float[Array, "b n"] | None = None,
    *,
    chunk: int = 16,
) -> Float[Array, " b"]:
    """The diversity score r(Z) of each image's tokens, exact for any n.

    Args:
      tokens: Z.
      valid: 0 for empty slots, which neither count nor may be the minimiser; None where all count.
      chunk: tokens tried as z at a time; memory grows with b · chunk · n · d, not with n².

    Returns:
      r(Z) in float32.
    """
    tokens = tokens.astype(jnp.float32)

    def one(z: Float[Array, "n d"], weight: Float[Array, " n"]) -> Float[Array, ""]:
        def distance(token: Float[Array, " d"]) -> Float[Array, ""]:
            return (jnp.abs(z - token).sum(axis=-1) * weight).sum()

        scores = jax.lax.map(distance, z, batch_size=min(chunk, z.shape[0]))
        return jnp.where(weight > 0, scores, jnp.inf).min()

    weight = jnp.ones(tokens.shape[:2]) if valid is None else (valid > 0).astype(jnp.float32)
    return jax.vmap(one)(tokens, weight)


def block_diversity(
    model: VisionTransformer, variables: PyTree, images: Float[Array, "b h w c"], *, chunk: int = 16
) -> Float[Array, "b depth"]:
    """r(Z) of the patch tokens that leave each block."""
    _, captured = model.apply(
        variables,
        images,
        capture_intermediates=lambda module, _: isinstance(module, Block),
        mutable=["intermediates"],
    )
    blocks = captured["intermediates"]
    scores = []
    for layer in range(model.depth):
        (state,) = blocks[f"blocks_{layer}"]["__call__"]
        assert isinstance(state, TokenState)
        scores.append(diversity(state.tokens, state.valid, chunk=chunk))
    return jnp.stack(scores, axis=1)


class OfBlocks(NamedTuple):
    """Means over a data set, behind each block.

    Attributes:
      diversity: r(Z) of the patch tokens.
      cosine, dense_cosine: fidelity to the unreduced model, see `fidelity.block_fidelity`.
    """

    diversity: Float[np.ndarray, " depth"]
    cosine: Float[np.ndarray, " depth"]
    dense_cosine: Float[np.ndarray, " depth"]


def mean_of_blocks(
    candidate: Candidate,
    against: Candidate,
    data_config: DataConfig,
    *,
    split: str = "validation",
    limit: int | None = None,
    mesh: Mesh | None = None,
) -> OfBlocks:
    """What blocks do to a data set.

    Args:
      candidate: with weights.
      against: the unreduced one.
      data_config: the data; a batch is rounded up to fill all devices.
      split: "validation" or "train".
      limit: how many batches to read; None for all.
      mesh: devices that share a batch; None for all there are.
    """
    mesh = sharding.make_mesh(sharding.MeshConfig()) if mesh is None else mesh
    size = data_config.eval_batch_size or data_config.batch_size
    size = -(-size // mesh.size) * mesh.size
    data_config = dataclasses.replace(data_config, eval_batch_size=size)
    rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    pair = candidate.model, against.model

    @functools.partial(jax.jit, in_shardings=(whole, rows), out_shardings=whole)
    def sums(variables: tuple[PyTree, PyTree], batch: dict[str, Array]) -> tuple[Array, Array]:
        images = normalise(batch["image"], data_config.mean, data_config.std)
        scores = block_diversity(pair[0], variables[0], images)
        real = batch["mask"].astype(jnp.float32)
        every = jnp.stack([scores, *block_fidelity(pair, variables, images)])
        return (every * real[:, None]).sum(axis=1), real.sum()

    variables = candidate.variables, against.variables
    total, count = np.zeros((3, candidate.model.depth)), 0.0
    for step, batch in enumerate(data.eval_batches(data_config, split)):
        if step == limit:
            break
        score, images = jax.device_get(sums(variables, sharding.place_batch(mesh, batch)))
        total += score
        count += float(images)
    return OfBlocks(*total / max(count, 1.0))


def diversity_rows(
    candidates: Sequence[Candidate],
    evaluation: Evaluation,
    *,
    block: int = -1,
    limit: int | None = None,
    note: Callable[[str], None] = silent,
) -> list[Result]:
    """Rows of a comparison with the diversity and the fidelity of the tokens behind each block.

    Args:
      candidates: who takes part; the unreduced model is added.
      evaluation: the data, for accuracy and diversity.
      block: whose tokens stand for a candidate in `diversity`.
      limit: batches that the diversity is averaged over; None for all.
      note: is told what is being done.

    Raises:
      InputError: see `compare`; or there is no such block.
    """
    for depth in (candidate.model.depth for candidate in candidates):
        if not -depth <= block < depth:
            raise InputError(f"expected a block below {depth}; got {block}")
    candidates = with_baselines(candidates)
    rows = []
    unreduced = {candidate.name: candidate for candidate in reversed(candidates)}
    compared = compare(candidates, evaluation=evaluation, note=note)
    for row, candidate in zip(compared, candidates, strict=True):
        note(f"scoring {candidate.name} {candidate.label}")
        model, against = candidate.model, unreduced[candidate.name]
        found = mean_of_blocks(candidate, against, evaluation.data_config(model), limit=limit)
        scores, cosines, dense = (tuple(values.tolist()) for values in found)
        rows.append(
            dataclasses.replace(
                row,
                diversity=scores[block],
                diversity_per_block=scores,
                cosine_per_block=cosines,
                dense_cosine_per_block=dense,
                tokens_per_block=tuple(plan.out for plan in model.schedule),
            )
        )
    return rows


# What stands behind each block, and how it reads.
TABLES: dict[str, tuple[str, Callable[[float], str]]] = {
    "diversity_per_block": ("Diversity", significant),
    "cosine_per_block": ("Cosine of the class token", lambda value: f"{value:.4f}"),
    "dense_cosine_per_block": ("Cosine of the patches", lambda value: f"{value:.4f}"),
}


def per_block(rows: Sequence[Result]) -> str:
    """What `diversity_rows` found behind each block, as Markdown: a table for each of `TABLES`."""

    def cell(values: Sequence[float], block: int, show: Callable[[float], str]) -> str:
        return show(values[block]) if block < len(values) else UNKNOWN

    tables = []
    for key, (title, show) in TABLES.items():
        depth = max(len(getattr(row, key) or ()) for row in rows)
        blocks = [
            Column(key, f"Block {i + 1}", functools.partial(cell, block=i, show=show))
            for i in range(depth)
        ]
        tables.append(f"{title}:\n\n{markdown(rows, ['model', 'method', 'keep_rate', *blocks])}")
    return "\n".join(tables)


def by_block(rows: Sequence[Result]) -> list[Result]:
    """A row for each block of each method that reduces: what a plot over blocks shows."""
    each = []
    for row in rows:
        if row.method == BASELINE:
            continue
        rates = "/".join(f"{rate:g}" for rate in np.atleast_1d(row.keep_rate or []))
        per = zip(row.diversity_per_block or (), row.dense_cosine_per_block or (), strict=True)
        for block, (score, cosine) in enumerate(per):
            named = dataclasses.replace(row, method=f"{row.method} {rates}".strip(), keep_rate=None)
            each.append(
                dataclasses.replace(
                    named,
                    description=row.description or row.method,
                    block=block + 1,
                    diversity=score,
                    dense_cosine=cosine,
                    dense_cosine_interval=None,
                )
            )
    return each
