"""Sparse training: kernels that stay sparse while where they are sparse is learned.

SViTE (Chen et al., NeurIPS 2021, arXiv 2106.04533, section 3.1) as a wrapper around an optimiser.
Each kernel has a mask with a fixed number of ones. At regular intervals, at step t of the T in
which masks move, the share

    rate(t) = prune_rate / 2 * (1 + cos(pi t / T))

of a kernel's active weights, those of the smallest magnitude, is switched off, and as many of the
inactive ones, those with the largest gradient, are switched on; new weights start at 0. How many
ones a kernel gets follows Erdos-Renyi-Kernel: its density grows with `sum(shape) / prod(shape)`, so
that small and narrow kernels stay denser. Or it is the same for all ("uniform").

A mask saves no time on today's accelerators; it saves memory once stored sparse. Biases, norms,
embeddings and a reducer's own weights stay dense. Settled here: the first masks keep the largest
weights instead of random ones, so that fine-tuning starts from what a checkpoint knows.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from tdm_jax.errors import InputError, unknown

DISTRIBUTIONS = ("erk", "uniform")


@dataclasses.dataclass(frozen=True)
class SparseConfig:
    """How sparse the kernels are, and for how long their masks move.

    Attributes:
      density: share of all kernels' weights that is active, in (0, 1]; 1 is dense training.
      prune_rate: share of a kernel's active weights that the first change replaces, in [0, 1].
      every: steps between changes.
      end: share of the training after which the masks rest, in (0, 1].
      distribution: of the ones over the kernels, "erk" or "uniform".
    """

    density: float = 1.0
    prune_rate: float = 0.5
    every: int = 100
    end: float = 0.75
    distribution: str = "erk"

    def __post_init__(self) -> None:
        for name in ("density", "end"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"sparse.{name} must lie in (0, 1], got {getattr(self, name)}")
        if not 0 <= self.prune_rate <= 1:
            raise InputError(f"sparse.prune_rate must lie in [0, 1], got {self.prune_rate}")
        if self.every < 1:
            raise InputError(f"sparse.every must be at least 1, got {self.every}")
        if self.distribution not in DISTRIBUTIONS:
            raise unknown("sparse.distribution", self.distribution, DISTRIBUTIONS)


class SparseState(NamedTuple):
    """The state of `sparse`.

    Attributes:
      step: updates so far, int32 [].
      masks: for each kernel which weights are active; MaskedNode for what stays dense.
      inner: the wrapped optimiser's.
    """

    step: Int[Array, ""]
    masks: PyTree
    inner: PyTree


def sparse(
    inner: optax.GradientTransformation, config: SparseConfig, steps: int
) -> optax.GradientTransformation:
    """Keeps the kernels of a model sparse under an optimiser.

    The first update also sets the inactive weights to 0: until then they are what they were.

    Args:
      inner: the optimiser; it sees no gradient of inactive weights.
      config: with density 1 the optimiser comes back as it is.
      steps: length of the training.

    Raises:
      InputError: `update` is called without parameters.
    """
    if config.density == 1:
        return inner
    end_step = max(1, round(config.end * steps))

    def init(params: PyTree) -> SparseState:
        counts = active_counts(params, config.density, config.distribution)
        masks = _map_kernels(lambda weight, count: largest(jnp.abs(weight), count), params, counts)
        return SparseState(jnp.zeros((), jnp.int32), masks, inner.init(params))

    def update(
        gradient: PyTree, state: SparseState, params: PyTree | None = None
    ) -> tuple[PyTree, SparseState]:
        if params is None:
            raise InputError("sparse training: update needs the parameters; got none")
        step = state.step
        rate = config.prune_rate / 2 * (1 + jnp.cos(jnp.pi * step / end_step))

        def change(masks: PyTree) -> PyTree:
            return _map_kernels(
                lambda weight, mask, slope: regrown(mask, weight, slope, rate),
                params,
                masks,
                gradient,
            )

        due = (step > 0) & (step % config.every == 0) & (step < end_step)
        masks = jax.lax.cond(due, change, lambda masks: masks, state.masks)
        seen = _map_active(lambda mask, slope: jnp.where(mask, slope, 0), masks, gradient)
        updates, inner_state = inner.update(seen, state.inner, params)
        # An update that takes a weight to 0, whatever it is: pruned weights end there at once.
        updates = _map_active(
            lambda mask, new, weight: jnp.where(mask, new, -weight), masks, updates, params
        )
        return updates, SparseState(step + 1, masks, inner_state)

    return optax.GradientTransformation(init, update)


def active_counts(params: PyTree, density: float, distribution: str) -> PyTree:
    """How many weights of each kernel are active, by a `distribution` of DISTRIBUTIONS.

    ERK sets kernel i's density to `e * sum(shape_i) / prod(shape_i)`, at most 1, with the e that
    makes `density` the density of all kernels together.
    """
    shapes = [leaf.shape for path, leaf in _leaves(params) if _is_kernel(path)]
    if distribution == "uniform":
        return _map_kernels(lambda weight: max(1, round(density * weight.size)), params)
    full: set[tuple[int, ...]] = set()
    while True:
        budget = sum(math.prod(s) * (density - (s in full)) for s in shapes)
        scale = budget / max(sum(sum(s) for s in shapes if s not in full), 1)
        over = {s for s in shapes if s not in full and scale * sum(s) > math.prod(s)}
        if not over:
            break
        full |= over

    def count(weight: Any) -> int:
        return weight.size if weight.shape in full else max(1, round(scale * sum(weight.shape)))

    return _map_kernels(count, params)


def largest(score: Float[Array, "..."], count: Int[Array, ""] | int) -> Bool[Array, "..."]:
    """Marks the `count` highest scores, ties to the lower index; `count` may be traced."""
    order = jnp.argsort(-score.ravel(), stable=True)
    return (jnp.argsort(order) < count).reshape(score.shape)


def regrown(
    mask: Bool[Array, "..."],
    weight: Float[Array, "..."],
    gradient: Float[Array, "..."],
    rate: Float[Array, ""],
) -> Bool[Array, "..."]:
    """One change of a kernel's mask: as many ones as before, a share `rate` of them elsewhere.

    A weight that was just switched off may be switched on again, by its gradient.
    """
    active = mask.sum()
    replaced = jnp.minimum((rate * active).astype(jnp.int32), mask.size - active)
    survivors = largest(jnp.where(mask, jnp.abs(weight), -1.0), active - replaced)
    grown = largest(jnp.where(survivors, -1.0, jnp.abs(gradient)), replaced)
    return survivors | grown


def _is_kernel(path: tuple[Any, ...]) -> bool:
    names = [key.key for key in path]
    return names[-1] == "kernel" and "reducer" not in names


def _leaves(params: PyTree) -> list[tuple[tuple[Any, ...], Any]]:
    return jax.tree_util.tree_leaves_with_path(params)


def _map_kernels(function: Callable, params: PyTree, *others: PyTree) -> PyTree:
    """`function` over the kernels; MaskedNode for the other leaves."""

    def each(path: tuple[Any, ...], leaf: Any, *more: Any) -> Any:
        return function(leaf, *more) if _is_kernel(path) else optax.MaskedNode()

    return jax.tree_util.tree_map_with_path(each, params, *others)


def _map_active(function: Callable, masks: PyTree, values: PyTree, *others: PyTree) -> PyTree:
    """`function` where there is a mask; the other leaves of `values` pass."""

    def each(mask: Any, value: Array, *more: Array) -> Array:
        return value if isinstance(mask, optax.MaskedNode) else function(mask, value, *more)

    return jax.tree.map(
        each, masks, values, *others, is_leaf=lambda node: isinstance(node, optax.MaskedNode)
    )
