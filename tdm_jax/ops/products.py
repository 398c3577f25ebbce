"""Linear maps, with gradients whose factors XLA likes."""

import jax
from jax import lax
from jaxtyping import Array, Float

Residuals = tuple[Array, ...]


@jax.custom_vjp
def product(x: Float[Array, "... k"], kernel: Float[Array, "k n"]) -> Float[Array, "... n"]:
    """`x @ kernel`."""
    return lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def _product_forward(
    x: Float[Array, "... k"], kernel: Float[Array, "k n"]
) -> tuple[Float[Array, "... n"], Residuals]:
    return product(x, kernel), (x, kernel)


def _product_backward(
    residuals: Residuals, g: Float[Array, "... n"]
) -> tuple[Float[Array, "... k"], Float[Array, "k n"]]:
    x, kernel = residuals
    rows = tuple(range(x.ndim - 1))

    def over_rows(narrow: Array, wide: Array) -> Array:
        # XLA's CPU backend lays the first factor out anew: cheap for the narrow one.
        return lax.dot_general(narrow, wide, ((rows, rows), ((), ())))

    if kernel.shape[0] <= kernel.shape[1]:
        gradient = over_rows(x, g)
    else:
        # The barrier keeps XLA from swapping the factors back.
        gradient = lax.optimization_barrier(over_rows(g, x)).T
    return lax.dot_general(g, kernel, (((g.ndim - 1,), (1,)), ((), ()))), gradient


product.defvjp(_product_forward, _product_backward)
