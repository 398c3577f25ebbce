"""How fast a device could be at best: `python -m tdm_jax.roofline --tflops=197 --gbs=819`.

A device needs at least `operations / peak` to compute and `bytes / bandwidth` to move; the larger
of the two bounds a forward pass from below (Williams et al., "Roofline", CACM 2009). Operations are
two a multiply-add (`costs.multiply_adds`). Bytes are what a well-fused program moves: the weights
once a batch; and for each token what the linear maps and the attention of a block read and write,
with norms, GELU and residual sums fused into them, and no n x n map.

The defaults are a TPU v5e's, in bfloat16.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from tdm_jax.analysis import candidate, costs, results
from tdm_jax.analysis.candidate import Candidate, with_baselines
from tdm_jax.analysis.results import Column, significant
from tdm_jax.cli import start
from tdm_jax.models.vit import VisionTransformer

COLUMNS = (
    *(c for c in results.COLUMNS if c.key in ("model", "method", "keep_rate")),
    Column("operations", "GFLOP/image", lambda v: significant(v / 1e9)),
    Column("bytes", "MB/image", lambda v: significant(v / 1e6)),
    Column("intensity", "FLOP/byte", significant),
    Column("bound", "Bound by", None),
    Column("images_per_second", "img/s at most", significant),
    Column("speedup", "Speed-up at most", lambda v: f"{v:.2f}×"),
)


def moved_bytes(model: VisionTransformer, batch_size: int, itemsize: int) -> float:
    """Bytes that a forward pass moves for one image.

    Args:
      model: with its reducer.
      batch_size: images that share one reading of the weights.
      itemsize: bytes of a weight and of an activation.
    """
    d, hidden, prefix = model.width, model.mlp_hidden, model.shape.prefix
    height, width = model.image_size
    # Patches are read, tokens written.
    total = height * width * model.in_channels + model.shape.patches * d
    for block in model.schedule:
        # qkv: d in, 3d out. Attention: 3d in, d out. Projection: d and the residual in, d out.
        total += (block.attention + prefix) * 11 * d
        # Each map of the MLP: in and out; the residual.
        total += (block.mlp + prefix) * (3 * d + 2 * hidden)
    return itemsize * (total + costs.parameters(model) / batch_size)


def roofline(
    entries: Sequence[Candidate],
    *,
    batch_size: int,
    itemsize: int,
    peak: float,
    bandwidth: float,
) -> list[dict[str, Any]]:
    """One row for each contender; the unreduced models are added.

    Args:
      entries: who takes part.
      batch_size: images of a forward pass.
      itemsize: bytes of a weight and of an activation.
      peak: operations per second.
      bandwidth: bytes per second.
    """
    rows: list[dict[str, Any]] = []
    base = 0.0
    for entry in with_baselines(entries):
        operations = 2 * costs.multiply_adds(entry.model)
        moved = moved_bytes(entry.model, batch_size, itemsize)
        compute, memory = operations / peak, moved / bandwidth
        rate = 1 / max(compute, memory)
        base = rate if entry.is_baseline else base
        rows.append(
            {
                "model": entry.name,
                "method": entry.method,
                "keep_rate": entry.keep_rate,
                "operations": operations,
                "bytes": moved,
                "intensity": operations / moved,
                "bound": "compute" if compute >= memory else "memory",
                "images_per_second": rate,
                "speedup": rate / base,
            }
        )
    return rows


def define_flags() -> None:
    """The command's flags."""
    candidate.define_flags(
        models=[f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")], methods=["tdm"]
    )
    flags.DEFINE_integer("batch_size", 256, "Images of a forward pass.", 1)
    flags.DEFINE_integer("itemsize", 2, "Bytes of a number.", 1)
    flags.DEFINE_float("tflops", 197.0, "The device's peak, in 1e12 operations per second.", 1e-6)
    flags.DEFINE_float("gbs", 819.0, "Its memory bandwidth, in 1e9 bytes per second.", 1e-6)
    flags.DEFINE_string("output", "", "Folder for roofline.md, .csv and .json.")


def main() -> None:
    """The command."""
    given = flags.FLAGS
    about = {key: given[key].value for key in ("batch_size", "itemsize", "tflops", "gbs")}
    rows = roofline(
        candidate.from_flags(),
        batch_size=given.batch_size,
        itemsize=given.itemsize,
        peak=1e12 * given.tflops,
        bandwidth=1e9 * given.gbs,
    )
    if given.output:
        results.write(rows, Path(given.output) / "roofline", about, columns=COLUMNS)
    print(results.markdown(rows, COLUMNS))


if __name__ == "__main__":
    define_flags()
    start.run(main)
