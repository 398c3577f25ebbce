"""What evaluation counts: sums over examples, so that batches of any size add up exactly."""

from collections.abc import Iterable, Mapping

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

SUMS = ("count", "top1", "top5", "loss")


def top_k(logits: Float[Array, "b c"], labels: Int[Array, " b"], k: int) -> Bool[Array, " b"]:
    """Whether the label is among the k largest logits; of equal logits the lower class wins.

    Counts the classes that beat the label instead of sorting: exact, and no collective on a
    sharded batch. An example whose logits hold a NaN is wrong, not accidentally right.
    """
    of_label = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    classes = jnp.arange(logits.shape[-1])
    beats = (logits > of_label) | ((logits == of_label) & (classes < labels[:, None]))
    rank = jnp.sum(beats, axis=-1)
    return (rank < k) & ~jnp.any(jnp.isnan(logits), axis=-1)


def per_example(
    logits: Float[Array, "b c"], labels: Int[Array, " b"]
) -> dict[str, Bool[Array, " b"] | Float[Array, " b"]]:
    """Whether the label is the first answer, among the first five, and the cross entropy."""
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    return {"top1": top_k(logits, labels, 1), "top5": top_k(logits, labels, 5), "loss": loss}


def sums(
    logits: Float[Array, "b c"], labels: Int[Array, " b"], mask: Bool[Array, " b"]
) -> dict[str, Float[Array, ""]]:
    """Number of examples, of top-1 and top-5 hits, and summed loss, where `mask` is set."""
    each = {"count": mask, **per_example(logits, labels)}
    return {
        name: jnp.sum(jnp.where(mask, value, 0.0), dtype=jnp.float32)
        for name, value in each.items()
    }


def summarise(batches: Iterable[Mapping[str, np.ndarray | Array | float]]) -> dict[str, float]:
    """Means over all examples of all batches: `top1` and `top5` in percent, `loss`, `count`."""
    # Python floats: a float32 total would round once it passes 2^24 examples.
    total = dict.fromkeys(SUMS, 0.0)
    for batch in batches:
        for name in SUMS:
            total[name] += float(batch[name])
    count = max(total["count"], 1.0)
    return {
        "top1": 100.0 * total["top1"] / count,
        "top5": 100.0 * total["top5"] / count,
        "loss": total["loss"] / count,
        "count": total["count"],
    }
