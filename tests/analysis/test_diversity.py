"""The diversity score against a loop, and what is scored in a network.

Covers tdm_jax.diversity.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax import create_model, data
from tdm_jax import diversity as command
from tdm_jax.analysis.candidate import Candidate
from tdm_jax.analysis.diversity import (
    block_diversity,
    by_block,
    diversity,
    diversity_rows,
    mean_of_blocks,
    per_block,
)
from tdm_jax.analysis.evaluation import Evaluation
from tdm_jax.analysis.results import significant
from tdm_jax.checkpoint import describe, save_model
from tdm_jax.errors import InputError
from tests import commands


def loop(z):
    """The definition, token by token."""
    return min(sum(np.abs(other - own).sum() for other in z) for own in z)


@pytest.mark.parametrize(("n", "chunk"), [(1, 4), (7, 4), (8, 4), (23, 5), (23, 100)])
def test_score_is_that_of_a_loop(n, chunk):
    z = np.random.default_rng(n).normal(size=(3, n, 11)).astype(np.float32) * 3 + 1
    expected = [loop(image.astype(np.float64)) for image in z]
    np.testing.assert_allclose(
        diversity(jnp.asarray(z), chunk=chunk), expected, rtol=1e-5, atol=1e-6
    )


def test_equal_tokens_have_no_diversity_and_scale_is_kept():
    z = jnp.broadcast_to(jax.random.normal(jax.random.key(0), (2, 1, 8)), (2, 9, 8))
    np.testing.assert_array_equal(diversity(z), np.zeros(2))
    z = jax.random.normal(jax.random.key(1), (2, 9, 8))
    np.testing.assert_allclose(diversity(4 * z), 4 * diversity(z), rtol=1e-6)


def test_empty_slots_do_not_count():
    z = jax.random.normal(jax.random.key(0), (2, 10, 8))
    padded = jnp.concatenate([z, jnp.full((2, 3, 8), 0.1)], axis=1)
    valid = jnp.concatenate([jnp.ones((2, 10)), jnp.zeros((2, 3))], axis=1)
    np.testing.assert_allclose(diversity(padded, valid), diversity(z), rtol=1e-6)


def test_no_array_holds_all_pairs():
    n, d, chunk = 512, 64, 4
    compiled = (
        jax.jit(lambda z: diversity(z, chunk=chunk))
        .lower(jax.ShapeDtypeStruct((1, n, d), jnp.float32))
        .compile()
    )
    all_pairs = 4 * n * n * d
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * 4 * chunk * n * d < all_pairs / 8


@pytest.fixture(scope="module")
def tiny():
    model = create_model(
        "vit",
        "topk",
        0.5,
        layers=(1,),
        image_size=28,
        patch_size=7,
        in_channels=1,
        width=32,
        depth=3,
        num_heads=2,
        num_classes=10,
    )
    return model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))


def test_patch_tokens_that_leave_each_block_are_scored(tiny):
    model, variables = tiny
    images = jax.random.normal(jax.random.key(2), (2, 28, 28, 1))
    scores = jax.jit(lambda v, x: block_diversity(model, v, x))(variables, images)
    assert scores.shape == (2, 3)
    assert [block.out for block in model.schedule] == [16, 8, 8]
    capture = functools.partial(model.apply, capture_intermediates=True)
    _, captured = jax.jit(capture)(variables, images)
    last = captured["intermediates"]["blocks_2"]["__call__"][0].tokens
    np.testing.assert_allclose(scores[:, 2], [loop(np.asarray(z)) for z in last], rtol=1e-5)


@pytest.mark.slow
def test_mean_over_a_data_set_counts_each_image_once(tiny):
    model, variables = tiny
    candidate = Candidate("tiny", "topk", 0.5, model, variables)

    def means(size, **settings):
        config = data.make_config(name="digits", eval_batch_size=size)
        return mean_of_blocks(candidate, candidate.unreduced(), config, **settings)

    found, other = means(200), means(256)
    assert found.diversity.shape == (3,)
    np.testing.assert_allclose(found, other, rtol=1e-5)
    assert (means(200, limit=1).diversity != found.diversity).all()
    # Defect G: a batch that the eight devices do not divide is rounded up.
    np.testing.assert_allclose(found, means(50), rtol=1e-5)
    # Before the first stage nothing is lost, and what is lost stays so.
    assert found.cosine[0] == pytest.approx(1, abs=1e-5)
    assert found.dense_cosine[0] > found.dense_cosine[1] > found.dense_cosine[2] > 0.5


@pytest.mark.slow
def test_rows_have_the_unreduced_model_and_every_block(tiny):
    candidate = Candidate("tiny", "topk", 0.5, *tiny)
    evaluation = Evaluation({"name": "digits", "eval_batch_size": 200})
    rows = diversity_rows([candidate], evaluation, limit=1, block=1)
    assert [row.method for row in rows] == ["none", "topk"]
    assert rows[1].tokens_per_block == (16, 8, 8)
    for row in rows:
        assert row.diversity == row.diversity_per_block[1]
    # Before the first stage nothing differs; after it fewer tokens leave less to sum up.
    assert rows[1].diversity_per_block[0] == rows[0].diversity_per_block[0]
    assert rows[1].diversity < rows[0].diversity
    tables = per_block(rows).split("\n\n")
    titles = ["Diversity:", "Cosine of the class token:", "Cosine of the patches:"]
    assert tables[::2] == titles
    head, _, none, topk = tables[1].splitlines()
    assert [cell.strip() for cell in head.split("|")[-4:-1]] == ["Block 1", "Block 2", "Block 3"]
    cells = [[cell.strip() for cell in line.split("|")[-4:-1]] for line in (none, topk)]
    assert cells[0][0] == cells[1][0] == significant(rows[0].diversity_per_block[0])
    assert rows[0].dense_cosine_per_block == pytest.approx((1, 1, 1), abs=1e-5)
    blocks = by_block(rows)
    assert [(row.method, row.block) for row in blocks] == [("topk 0.5", i) for i in (1, 2, 3)]
    assert blocks[2].dense_cosine == rows[1].dense_cosine_per_block[2]
    with pytest.raises(InputError, match="block below 3; got 3"):
        diversity_rows([candidate], evaluation, block=3)


@pytest.mark.slow
def test_the_command_writes_tables_and_a_plot(tiny, tmp_path, capsys):
    save_model(tmp_path / "tiny", describe(tiny[0]), tiny[1])
    commands.run(
        command,
        f"--models={tmp_path / 'tiny'}",
        "--methods=topk",
        "--layers=1",
        "--data=digits",
        "--eval_batch_size=100",
        "--batches=1",
        f"--output={tmp_path / 'out'}",
    )
    assert "| Block 3 |" in capsys.readouterr().out
    names = {f"diversity.{suffix}" for suffix in ("md", "csv", "json", "svg", "png")}
    names |= {
        f"fidelity-{of}.{suffix}" for of in ("block", "diversity") for suffix in ("svg", "png")
    }
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
