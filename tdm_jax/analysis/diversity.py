"""The diversity score of "Beyond Attentive Tokens" (CVPR 2023), per block, over a data set.

`r(Z) = ||Z - 1 z^T||` in the entrywise l1 norm, with z the token of Z that minimises it:
`min_i sum_n sum_c |Z_nc - Z_ic|`. It is 0 where all tokens are equal.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from tdm_jax import data
from tdm_jax.analysis.candidate import Candidate, with_baselines
from tdm_jax.analysis.comparison import compare
from tdm_jax.analysis.evaluation import Evaluation
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


def mean_diversity(
    model: VisionTransformer,
    variables: PyTree,
    data_config: DataConfig,
    *,
    split: str = "validation",
    limit: int | None = None,
    mesh: Mesh | None = None,
) -> Float[np.ndarray, " depth"]:
    """The mean over a data set of r(Z) after each block.

    Args:
      model: with its reducer.
      variables: of the model.
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

    @functools.partial(jax.jit, in_shardings=(whole, rows), out_shardings=whole)
    def sums(variables: PyTree, batch: dict[str, Array]) -> tuple[Array, Array]:
        images = normalise(batch["image"], data_config.mean, data_config.std)
        scores = block_diversity(model, variables, images)
        real = batch["mask"].astype(jnp.float32)
        return (scores * real[:, None]).sum(axis=0), real.sum()

    total, count = np.zeros(model.depth), 0.0
    for step, batch in enumerate(data.eval_batches(data_config, split)):
        if step == limit:
            break
        score, images = jax.device_get(sums(variables, sharding.place_batch(mesh, batch)))
        total += score
        count += float(images)
    return total / max(count, 1.0)


def diversity_rows(
    candidates: Sequence[Candidate],
    evaluation: Evaluation,
    *,
    block: int = -1,
    limit: int | None = None,
) -> list[Result]:
    """Rows of a comparison with the diversity of the tokens that leave each block.

    Args:
      candidates: who takes part; the unreduced model is added.
      evaluation: the data, for accuracy and diversity.
      block: whose tokens stand for a candidate in `diversity`.
      limit: batches that the diversity is averaged over; None for all.

    Raises:
      InputError: see `compare`; or there is no such block.
    """
    for depth in (candidate.model.depth for candidate in candidates):
        if not -depth <= block < depth:
            raise InputError(f"expected a block below {depth}; got {block}")
    candidates = with_baselines(candidates)
    rows = []
    for row, candidate in zip(compare(candidates, evaluation=evaluation), candidates, strict=True):
        model = candidate.model
        config = evaluation.data_config(model)
        scores = mean_diversity(model, candidate.variables, config, limit=limit).tolist()
        rows.append(
            dataclasses.replace(
                row,
                diversity=scores[block],
                diversity_per_block=tuple(scores),
                tokens_per_block=tuple(plan.out for plan in model.schedule),
            )
        )
    return rows


def per_block(rows: Sequence[Result]) -> str:
    """The diversity after each block of `diversity_rows`, as Markdown."""

    def score(scores: Sequence[float], block: int) -> str:
        return significant(scores[block]) if block < len(scores) else UNKNOWN

    depth = max(len(row.diversity_per_block or ()) for row in rows)
    blocks = [
        Column("diversity_per_block", f"Block {i + 1}", functools.partial(score, block=i))
        for i in range(depth)
    ]
    return markdown(rows, ["model", "method", "keep_rate", *blocks])
