"""How fast a device could be at best.

A device needs at least `operations / peak` to compute and `bytes / bandwidth` to move; the larger
of the two bounds a forward pass from below (Williams et al., "Roofline", CACM 2009). Operations are
two a multiply-add of the program's products (`costs.executed`). Bytes are what a well-fused program
moves: the weights once a batch; and for each token what the linear maps and the attention of a
block read and write, with norms, activations, gates, rotations and residual sums fused into them,
and no n x n map.
"""

from collections.abc import Sequence

from tdm_jax.analysis import costs
from tdm_jax.analysis.candidate import Candidate, with_baselines
from tdm_jax.analysis.machines import TPUS
from tdm_jax.analysis.results import COLUMNS, Column, Result, significant
from tdm_jax.models.vit import VisionTransformer

# Peak operations a second in bfloat16, and bytes a second, by the vendors' data sheets.
DEVICES = {"v5e": (TPUS["v5e"].flops, TPUS["v5e"].bandwidth), "H100": (989e12, 3350e9)}

TABLE = (
    *("model", "method", "keep_rate"),
    Column("operations", "GFLOP/image", lambda v: significant(v / 1e9)),
    Column("bytes", "MB/image", lambda v: significant(v / 1e6)),
    Column("intensity", "FLOP/byte", significant),
    Column("bound", "Bound by"),
    COLUMNS["images_per_second"]._replace(heading="img/s at most"),
    COLUMNS["speedup"]._replace(heading="Speed-up at most"),
)


def moved_bytes(model: VisionTransformer, batch_size: int, itemsize: int) -> float:
    """Bytes that a forward pass moves for one image.

    Args:
      model: with its reducer.
      batch_size: images that share one reading of the weights.
      itemsize: bytes of a weight and of an activation.
    """
    d, prefix = model.width, model.shape.prefix
    # A gate is fused into the map that reads it: gate and value are written, and read.
    hidden = model.mlp_hidden * (1 + model.gated_mlp)
    height, width = model.image_size
    # Patches are read, tokens written.
    total = height * width * model.in_channels + model.shape.patches * d
    for block in model.schedule[: None if model.read is None else -1]:
        # qkv: d in, 3d out. Attention: 3d in, d out. Projection: d and the residual in, d out.
        total += (block.attention + prefix) * 11 * d
        # Each map of the MLP: in and out; the residual.
        total += (block.mlp + prefix) * (3 * d + 2 * hidden)
    if model.read is not None:  # by few queries, which ask the tokens themselves
        total += (model.schedule[-1].attention + prefix) * d
    # The pooling head: keys and values, d in, 2d out, and its attention, 2d in. A mean: d in.
    tokens = model.schedule[-1].out
    if model.pooling == "map":
        total += (tokens + prefix) * 5 * d
    elif model.pooling.endswith("avg"):
        total += tokens * d
    return itemsize * (total + costs.parameters(model) / batch_size)


def roofline(
    candidates: Sequence[Candidate],
    *,
    batch_size: int,
    itemsize: int,
    peak: float,
    bandwidth: float,
) -> list[Result]:
    """One row for each candidate; the unreduced models are added.

    Args:
      candidates: who takes part.
      batch_size: images of a forward pass.
      itemsize: bytes of a weight and of an activation.
      peak: operations per second.
      bandwidth: bytes per second.
    """
    rows: list[Result] = []
    baseline_rate = 0.0
    for candidate in with_baselines(candidates):
        operations = 2 * costs.executed(candidate.model)
        moved = moved_bytes(candidate.model, batch_size, itemsize)
        compute, memory = operations / peak, moved / bandwidth
        rate = 1 / max(compute, memory)
        baseline_rate = rate if candidate.is_baseline else baseline_rate
        rows.append(
            Result(
                **candidate.row,
                operations=operations,
                bytes=moved,
                intensity=operations / moved,
                bound="compute" if compute >= memory else "memory",
                images_per_second=rate,
                speedup=rate / baseline_rate,
            )
        )
    return rows
