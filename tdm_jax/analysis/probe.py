"""What frozen features know of classes: nearest neighbours, and a linear classifier on top.

`nearest_neighbours` is DINO's protocol (Caron et al., ICCV 2021, arXiv 2104.14294), which DINOv2
keeps: the 20 nearest training images by cosine vote with exp(cosine / 0.07). `linear_probe` is
multinomial logistic regression on standardised features, by L-BFGS, whose penalty is the one that
answers best on a part of the training images that was held out. Fitting holds the features four
times at most: as they are, standardised, without those held out, and on the devices.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from tdm_jax.analysis.features import Features
from tdm_jax.ops.distances import unit
from tdm_jax.parallel import sharding

NEIGHBOURS, TEMPERATURE = 20, 0.07
# Penalties on half the squared weights, beside the mean cross entropy; from strong to weak.
PENALTIES = tuple(10.0**exponent for exponent in np.arange(0, -6.5, -0.5).tolist())
HELD_OUT = 0.2
_QUERIES, _BANK, _ROWS = 512, 65_536, 4096  # at a time


class Head(NamedTuple):
    """A linear classifier of raw features: `features @ kernel + bias`."""

    kernel: Float[np.ndarray, "d k"]
    bias: Float[np.ndarray, " k"]

    def __call__(self, values: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n k"]:
        """The logits."""
        return values @ self.kernel + self.bias


class Probed(NamedTuple):
    """What a search for the penalty found.

    Attributes:
      head: fitted to all training features with the best one.
      penalty: the best one.
      held_out: share of the held-out images that each penalty gets right, in percent.
    """

    head: Head
    penalty: float
    held_out: dict[float, float]


def nearest_neighbours(
    train: Features, test: Features, classes: int, *, k: int = NEIGHBOURS
) -> Float[np.ndarray, " n"]:
    """Whether the neighbours' vote is right: 1 or 0 for each test image.

    Args:
      train: who votes.
      test: who is asked.
      classes: how many there are.
      k: how many vote, at most all.
    """
    k = min(k, len(train.labels))
    bank = [
        (unit(jnp.asarray(train.values[i : i + _BANK])), train.labels[i : i + _BANK])
        for i in range(0, len(train.labels), _BANK)
    ]
    right = []
    for start in range(0, len(test.labels), _QUERIES):
        queries = unit(jnp.asarray(test.values[start : start + _QUERIES]))
        nearest = (jnp.full((len(queries), k), -jnp.inf), jnp.zeros((len(queries), k), jnp.int32))
        for values, labels in bank:
            nearest = _nearer(queries, nearest, values, jnp.asarray(labels))
        answers = np.asarray(_vote(*nearest, classes))
        right.append(answers == test.labels[start : start + _QUERIES])
    return np.concatenate(right).astype(np.float64)


@jax.jit
def _nearer(
    queries: Float[Array, "q d"],
    nearest: tuple[Float[Array, "q k"], Int[Array, "q k"]],
    bank: Float[Array, "n d"],
    labels: Int[Array, " n"],
) -> tuple[Float[Array, "q k"], Int[Array, "q k"]]:
    cosines = jnp.concatenate([nearest[0], queries @ bank.T], axis=1)
    owners = jnp.broadcast_to(labels, (len(queries), len(labels)))
    cosines, index = jax.lax.top_k(cosines, nearest[0].shape[1])
    owners = jnp.concatenate([nearest[1], owners], axis=1)
    return cosines, jnp.take_along_axis(owners, index, axis=1)


@functools.partial(jax.jit, static_argnums=2)
def _vote(cosines: Float[Array, "q k"], labels: Int[Array, "q k"], classes: int) -> Array:
    votes = jnp.exp(cosines / TEMPERATURE)[..., None] * jax.nn.one_hot(labels, classes)
    return votes.sum(axis=1).argmax(axis=-1)


def linear_probe(
    train: Features,
    classes: int,
    *,
    penalties: Sequence[float] = PENALTIES,
    seed: int = 0,
    note: Callable[[str], None] = lambda text: None,
) -> Probed:
    """Fits a classifier to features.

    Args:
      train: features with their labels.
      classes: how many there are.
      penalties: to choose from, by the images held out; of equally good ones the first.
      seed: of the choice of images that are held out.
      note: is told what is being done.
    """
    mean, std = train.values.mean(axis=0), train.values.std(axis=0)
    std = np.where(std > 0, std, 1)
    standardised = Features((train.values - mean) / std, train.labels)
    order = np.random.default_rng(seed).permutation(len(train.labels))
    held = order[: max(1, round(HELD_OUT * len(order)))]
    chosen = _Fit(Features(*(array[order[len(held) :]] for array in standardised)), classes)
    unseen = Features(*(array[held] for array in standardised))
    held_out, start = {}, None
    for penalty in penalties:
        start = chosen(penalty, start)
        hits = Head(*start)(unseen.values).argmax(axis=1) == unseen.labels
        held_out[penalty] = 100 * float(hits.mean())
        note(f"probe: penalty {penalty:.1e}, {held_out[penalty]:.2f}% of the held-out images")
    best = max(held_out, key=lambda penalty: held_out[penalty])
    kernel, bias = _Fit(standardised, classes)(best)
    kernel = kernel / std[:, None]
    return Probed(Head(kernel, bias - mean @ kernel), best, held_out)


class _Fit:
    """Logistic regression on features that lie on all devices, some of them on each."""

    def __init__(self, train: Features, classes: int) -> None:
        mesh = sharding.make_mesh(sharding.MeshConfig())
        (n, d), rows = train.values.shape, -(-_ROWS // mesh.size) * mesh.size
        chunks = -(-n // rows)

        def spread(array: np.ndarray) -> Any:
            filled = np.zeros((chunks * rows, *array.shape[1:]), array.dtype)
            filled[:n] = array
            place = sharding.batch_sharding(mesh)
            place = jax.NamedSharding(mesh, jax.P(None, *place.spec))
            return jax.device_put(filled.reshape(chunks, rows, *array.shape[1:]), place)

        weight = np.full(n, 1 / n, np.float32)
        self._data = spread(train.values.astype(np.float32)), spread(train.labels), spread(weight)
        self._shapes = (d, classes), (classes,)

    def __call__(self, penalty: float, start: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """Kernel and bias; `start` is where to begin."""
        first = start or tuple(np.zeros(shape, np.float32) for shape in self._shapes)
        kernel, bias = jax.device_get(_minimise(first, self._data, jnp.float32(penalty)))
        return kernel, bias


@jax.jit
def _minimise(start: PyTree, data: PyTree, penalty: Float[Array, ""]) -> PyTree:
    """The weights of least mean cross entropy and penalty, by L-BFGS."""

    @jax.checkpoint  # a chunk's logits are not kept
    def of_chunk(weights: PyTree, chunk: PyTree) -> Float[Array, ""]:
        (kernel, bias), (values, labels, weight) = weights, chunk
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(
            values @ kernel + bias, labels
        )
        return (losses * weight).sum()

    def loss(weights: PyTree) -> Float[Array, ""]:
        def add(total: Array, chunk: PyTree) -> tuple[Array, None]:
            return total + of_chunk(weights, chunk), None

        total, _ = jax.lax.scan(add, jnp.zeros(()), data)
        return total + penalty / 2 * (weights[0] ** 2).sum()

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry: Any) -> Any:
        weights, state, _, count = carry
        value, gradient = value_and_grad(weights, state=state)
        updates, state = solver.update(
            gradient, state, weights, value=value, grad=gradient, value_fn=loss
        )
        return optax.apply_updates(weights, updates), state, optax.tree.norm(gradient), count + 1

    def goes_on(carry: Any) -> Bool[Array, ""]:
        return (carry[2] > 1e-5) & (carry[3] < 400)

    first = (start, solver.init(start), jnp.asarray(jnp.inf), 0)
    return jax.lax.while_loop(goes_on, step, first)[0]
