"""How a large sequence should lie in memory."""

from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float


def token_major(x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    # The layout in which the TPU's compiler keeps the sequences of so large a batch, and into which
    # it fuses the norms, but which it does not find behind a product by itself.
    large = isinstance(x.shape[0], int) and x.shape[0] >= 128  # no symbol of jax.export
    if not large:
        return x
    return with_layout_constraint(x, Layout(major_to_minor=(1, 0, 2)))
