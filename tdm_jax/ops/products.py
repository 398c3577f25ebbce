"""Linear maps, with gradients whose factors XLA likes."""

import jax
from jax import lax
from jaxtyping import Array, Float


@jax.custom_jvp
def product(x: Float[Array, "... k"], kernel: Float[Array, "k n"]) -> Float[Array, "... n"]:
    """`x @ kernel`; the kernel's gradient has the narrow one of its factors first.

    XLA's CPU backend lays the first factor out anew, which is cheap for the narrow one
    (docs/performance.md, CPU, "weights' gradients with the narrow factor first").
    """
    return _contract(x, kernel, 0)


def _contract(x: Float[Array, "... k"], kernel: Float[Array, "a b"], axis: int) -> Array:
    return lax.dot_general(x, kernel, (((x.ndim - 1,), (axis,)), ((), ())))


def _along_kernel(
    tangent: Float[Array, "k n"],
    y: Float[Array, "... n"],
    x: Float[Array, "... k"],
    kernel: Float[Array, "k n"],
) -> Float[Array, "... n"]:
    del y
    # JAX transposes this to `(g.T @ x).T`, of which XLA makes `x.T @ g`. Where g is the narrow one
    # a barrier, whose transpose is another one, keeps it from that.
    if kernel.shape[0] <= kernel.shape[1]:
        return _contract(x, tangent, 0)
    return _contract(x, lax.optimization_barrier(tangent.T), 1)


product.defjvps(lambda tangent, y, x, kernel: _contract(tangent, kernel, 0), _along_kernel)
