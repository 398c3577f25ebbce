"""Density peaks against a slow reference in float64, written from the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax.reduction.density_peaks import density_peaks


def reference(z, clusters, neighbors=None):
    """The cluster of each token [n], by loops over TDM.md's definition."""
    n, d = z.shape
    distance = np.array([[np.sqrt(((a - b) ** 2).sum() / d) for b in z] for a in z])
    k = n if neighbors is None else min(neighbors, n)
    density = [np.exp(-np.mean(sorted(row**2)[:k])) for row in distance]
    separation = []
    for i in range(n):
        denser = [
            distance[i, j]
            for j in range(n)
            if density[j] > density[i] or (density[j] == density[i] and j < i)
        ]
        separation.append(min(denser) if denser else distance.max())
    score = [r * s for r, s in zip(density, separation, strict=True)]
    centres = sorted(range(n), key=lambda i: (-score[i], i))[:clusters]
    route = []
    for i in range(n):
        if i in centres:
            route.append(centres.index(i))
        else:
            route.append(min(range(clusters), key=lambda c: (distance[i, centres[c]], c)))
    return np.array(route)


@functools.partial(jax.jit, static_argnums=(1, 2))
def run(tokens, clusters, neighbors):
    return density_peaks(tokens, clusters, neighbors).route(tokens.shape[1])


@pytest.mark.parametrize(("clusters", "neighbors"), [(4, None), (7, 5), (1, None), (12, 40)])
def test_against_the_reference(clusters, neighbors):
    tokens = np.random.default_rng(clusters).standard_normal((3, 12, 6))
    expected = [reference(z, clusters, neighbors) for z in tokens]
    np.testing.assert_array_equal(run(jnp.array(tokens), clusters, neighbors), expected)


def test_clear_groups_are_found_far_from_the_origin():
    draw = np.random.default_rng(0)
    group = np.repeat(np.arange(3), 5)
    tokens = 1000.0 + 5.0 * np.eye(3)[group] + 0.05 * draw.standard_normal((15, 3))
    route = np.asarray(run(jnp.array(tokens, jnp.float32)[None], 3, None))[0]
    assert len(set(route)) == 3
    assert all(len(set(route[group == g])) == 1 for g in range(3))


def test_equal_tokens_leave_no_cluster_empty():
    route = run(jnp.ones((1, 6, 4)), 3, None)
    assert set(np.asarray(route)[0].tolist()) == {0, 1, 2}


def test_densities_do_not_underflow():
    # exp(-mean D^2) is 0 in float32 for all of these, yet they differ: the third is the densest,
    # then the second, then the first.
    tokens = jnp.array([[[-60.0], [0.0], [1.0], [90.0]]])
    np.testing.assert_array_equal(run(tokens, 3, None), [[2, 1, 0, 0]])
