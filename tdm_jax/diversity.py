"""The diversity score of "Beyond Attentive Tokens" (CVPR 2023), per block, over a data set.

`r(Z) = ||Z - 1 z^T||` in the entrywise l1 norm, with z the token of Z that minimises it:
`min_i sum_n sum_c |Z_nc - Z_ic|`. It is 0 where all tokens are equal.

    python -m tdm_jax.diversity --models=deit_small.pth --methods=topk,evit,tdm --data=folder \
        --data_dir=/data/imagenet --output=diversity

writes `diversity.md`, `.csv`, `.json` and a plot of diversity against accuracy.
"""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from tdm_jax import compare, data
from tdm_jax.analysis import candidate, environment, results
from tdm_jax.analysis.candidate import Candidate
from tdm_jax.analysis.results import Column, Row
from tdm_jax.cli import start
from tdm_jax.data import DataConfig
from tdm_jax.data.device_transforms import normalise
from tdm_jax.errors import InputError
from tdm_jax.models.vit import Block, VisionTransformer
from tdm_jax.parallel import sharding
from tdm_jax.plotting import plots
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
      chunk: candidates for z at a time; memory grows with b · chunk · n · d, not with n².

    Returns:
      r(Z) in float32.
    """
    tokens = tokens.astype(jnp.float32)

    def one(z: Float[Array, "n d"], weight: Float[Array, " n"]) -> Float[Array, ""]:
        def distance(candidate: Float[Array, " d"]) -> Float[Array, ""]:
            return (jnp.abs(z - candidate).sum(axis=-1) * weight).sum()

        scores = jax.lax.map(distance, z, batch_size=min(chunk, z.shape[0]))
        return jnp.where(weight > 0, scores, jnp.inf).min()

    weight = jnp.ones(tokens.shape[:2]) if valid is None else (valid > 0).astype(jnp.float32)
    return jax.vmap(one)(tokens, weight)


def block_diversity(
    model: VisionTransformer, params: PyTree, images: Float[Array, "b h w c"], *, chunk: int = 16
) -> Float[Array, "b depth"]:
    """r(Z) of the patch tokens that leave each block."""
    _, captured = model.apply(
        params,
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
    params: PyTree,
    source: DataConfig,
    *,
    split: str = "validation",
    limit: int | None = None,
    mesh: Mesh | None = None,
) -> Float[np.ndarray, " depth"]:
    """The mean over a data set of r(Z) after each block.

    Args:
      model: with its reducer.
      params: its parameters.
      source: the data.
      split: "validation" or "train".
      limit: how many batches to read; None for all.
      mesh: devices that share a batch; None for all there are.
    """
    mesh = sharding.make_mesh(sharding.MeshConfig()) if mesh is None else mesh
    split_rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)

    @functools.partial(jax.jit, in_shardings=(whole, split_rows), out_shardings=whole)
    def sums(params: PyTree, batch: dict[str, Array]) -> tuple[Array, Array]:
        scores = block_diversity(model, params, normalise(batch["image"], source.mean, source.std))
        real = batch["mask"].astype(jnp.float32)
        return (scores * real[:, None]).sum(axis=0), real.sum()

    total, count = np.zeros(model.depth), 0.0
    for step, batch in enumerate(data.eval_batches(source, split)):
        if step == limit:
            break
        score, images = jax.device_get(sums(params, sharding.place_batch(mesh, batch)))
        total += score
        count += float(images)
    return total / max(count, 1.0)


def diversity_rows(
    entries: Sequence[Candidate], source: DataConfig, *, block: int = -1, limit: int | None = None
) -> list[dict[str, object]]:
    """Rows of a comparison with the diversity of the tokens that leave each block.

    Args:
      entries: who takes part; the unreduced model is added.
      source: the data, for accuracy and diversity.
      block: whose tokens stand for a contender in `diversity`.
      limit: batches that the diversity is averaged over; None for all.

    Raises:
      InputError: see `compare.compare`; or there is no such block.
    """
    for entry in entries:
        if not -entry.model.depth <= block < entry.model.depth:
            raise InputError(f"expected a block below {entry.model.depth}; got {block}")
    rows = []
    for row in compare.compare(entries, source=source):
        one = row.contender
        scores = mean_diversity(one.model, one.params, source, limit=limit)
        rows.append(
            row.record()
            | {
                "diversity": float(scores[block]),
                "diversity_per_block": [float(score) for score in scores],
                "tokens_per_block": [plan.out for plan in one.model.schedule],
            }
        )
    return rows


def per_block(rows: Sequence[Row]) -> str:
    """The diversity after each block of `diversity_rows`, as Markdown."""
    depth = max(len(row["diversity_per_block"]) for row in rows)
    named = [c for c in results.COLUMNS if c.key in ("model", "method", "keep_rate")]
    blocks = [Column(f"block{i + 1}", f"Block {i + 1}", results.significant) for i in range(depth)]
    values = [
        {**row, **{f"block{i + 1}": score for i, score in enumerate(row["diversity_per_block"])}}
        for row in rows
    ]
    return results.markdown(values, [*named, *blocks])


def define_flags() -> None:
    """The command's flags; not at import, so that programs may import several commands."""
    candidate.define_flags()
    candidate.define_data_flags()
    flags.DEFINE_integer("block", -1, "Block whose tokens are plotted, from 0; -1 is the last.")
    flags.DEFINE_integer("batches", None, "Batches that the diversity is averaged over.", 1)
    flags.DEFINE_string("output", "", "Folder for the tables and the plot.")


def main() -> None:
    """The command."""
    given = flags.FLAGS
    results.check_folder(given.output)
    entries = candidate.from_flags()
    source = candidate.data_from_flags(entries[0].model)
    if source is None:
        raise InputError("diversity is measured on images; expected --data; got none")
    print(f"scoring {len(entries)} contenders on {source.name}", file=sys.stderr, flush=True)
    rows = diversity_rows(entries, source, block=given.block, limit=given.batches)
    remark = f"{per_block(rows)}\n{environment.line(environment.describe())}"
    if given.output:
        stem = Path(given.output) / "diversity"
        results.write(rows, stem, environment.describe() | {"block": given.block}, remark=remark)
        figure = plots.plot(rows, "diversity")
        for suffix in (".svg", ".png"):
            plots.save(figure, f"{stem}{suffix}")
    print(f"{results.markdown(rows)}\n{remark}")


if __name__ == "__main__":
    define_flags()
    start.run(main)
