"""How a large sequence should lie in memory."""

from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float


def token_major(x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """A large batch with the tokens before the images.

    So the TPU's compiler keeps it and fuses the norms into it, but it does not find that behind a
    product by itself (docs/measurements.md, TPU, "the sequence after a stage laid out").
    """
    large = isinstance(x.shape[0], int) and x.shape[0] >= 128  # no symbol of jax.export
    if not large:
        return x
    return with_layout_constraint(x, Layout(major_to_minor=(1, 0, 2)))
