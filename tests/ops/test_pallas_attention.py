"""The TPU's kernel in Pallas's interpreter; its gradient is that of the products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tdm_jax.ops import attention, pallas_attention
from tdm_jax.ops.attention import attend, by_heads, by_products
from tdm_jax.ops.platform import pinned, portable, reverse_mode, split_over
from tdm_jax.parallel.sharding import MeshConfig, make_mesh


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """How many arrays the kernel was given, each time it was traced."""
    counts = []
    kernel = pallas_attention.fused_attention

    def counted(parts, bias, num_heads):
        counts.append(len(parts))
        return kernel(parts, bias, num_heads)

    monkeypatch.setattr(pallas_attention, "fused_attention", counted)
    return counts


def draw(tokens, heads=2, channels=64, batch=2, dtype=jnp.bfloat16):
    """What the linear map gives, and its thirds with their heads apart."""
    width = 3 * heads * channels
    packed = jax.random.normal(jax.random.key(tokens), (batch, tokens, width), dtype)
    return packed, apart(packed, heads)


def apart(packed, heads):
    return tuple(part.reshape(*part.shape[:2], heads, -1) for part in jnp.split(packed, 3, axis=-1))


def agree(ours, theirs, atol):
    ours, theirs = (np.asarray(x, np.float32) for x in (ours, theirs))
    np.testing.assert_allclose(ours, theirs, atol=atol)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("heads", "channels"), [(1, 128), (2, 64), (8, 32)])
def test_it_answers_as_the_products_do(heads, channels, biased):
    packed, (q, k, v) = draw(7, heads, channels, dtype=jnp.float32)
    bias = jax.random.normal(jax.random.key(1), (2, 7)) if biased else None
    expected = by_products(q, k, v, bias).reshape(2, 7, -1)
    parts = tuple(x.reshape(2, 7, -1) for x in (q, k, v))
    for given in (parts, (packed,)):
        agree(pallas_attention.fused_attention(given, bias, heads), expected, 1e-5)


def test_long_sequences_go_a_part_of_the_queries_at_a_time(monkeypatch):
    monkeypatch.setattr(pallas_attention, "_LOGITS", 37 * 16)  # 16, 16 and 5 queries
    packed, qkv = draw(37, dtype=jnp.float32)
    ours = pallas_attention.fused_attention((packed,), None, 2)
    agree(ours, by_products(*qkv).reshape(2, 37, -1), 1e-5)


def test_a_program_for_tpus_has_it(calls):
    packed, qkv = draw(7)
    expected = by_products(*qkv)
    agree(attend(*qkv, packed=packed), by_heads(*qkv), 0)
    assert not calls
    with pinned("tpu"):
        agree(attend(*qkv, packed=packed), expected, 0.02)
        agree(attend(*qkv), expected, 0.02)
    assert calls == [1, 3]


@pytest.mark.parametrize(
    ("settings", "context"),
    [
        ({"dtype": jnp.float32}, None),
        ({"channels": 48}, None),
        ({"heads": 3}, None),
        ({}, portable),
    ],
)
def test_what_has_none(calls, settings, context):
    packed, qkv = draw(7, **settings)
    with pinned("tpu"):
        if context is None:
            attend(*qkv, packed=packed)
        else:
            with context():
                attend(*qkv, packed=packed)
    assert not calls


@pytest.mark.parametrize("whole", [False, True])
def test_it_differentiates_as_the_products_do(whole):
    packed, _ = draw(7)
    bias = jnp.linspace(0.0, 1.0, 14).reshape(2, 7)

    def through(function):
        def answer(packed, bias):
            q, k, v = apart(packed, 2)
            more = {"packed": packed} if whole and function is attend else {}
            return jnp.sin(function(q, k, v, bias, **more).astype(jnp.float32)).sum()

        return jax.jit(jax.grad(answer, argnums=(0, 1)))(packed, bias)

    expected = through(by_products)
    with pinned("tpu"):
        ours = through(attend)
    for one, other in zip(ours, expected, strict=True):
        agree(one, other, 0.05)


@pytest.mark.parametrize(("heads", "channels"), [(1, 128), (4, 64)])
def test_its_own_backward_pass(calls, heads, channels):
    packed, _ = draw(7, heads, channels)

    def through(function, **more):
        def answer(packed):
            y = function(*apart(packed, heads), **({"packed": packed} if more else {}))
            return jnp.sin(y.astype(jnp.float32)).sum()

        return jax.jit(jax.grad(answer))(packed)

    expected = through(by_products)
    with pinned("tpu"), reverse_mode():
        agree(through(attend, packed=True), expected, 0.05)
        assert calls == [1]
        with pytest.raises(TypeError, match="jvp"):
            jax.jvp(lambda x: attend(*apart(x, heads), packed=x), (packed,), (packed,))


def test_training_without_it(calls, monkeypatch):
    packed, qkv = draw(7)
    with pinned("tpu"), reverse_mode():
        attend(*qkv)
        attend(*qkv, jnp.zeros((2, 7)), packed)
        monkeypatch.setattr(pallas_attention, "_GRADIENT", 7)
        attend(*qkv, packed=packed)
    assert not calls


def test_batches_of_batches(calls):
    _, qkv = draw(7)
    expected = by_products(*qkv)
    with pinned("tpu"):
        each = jax.vmap(lambda *qkv: attend(*(x[None] for x in qkv))[0])(*qkv)
    agree(each, expected, 0.02)
    assert calls


def test_devices_keep_the_gradient_of_their_own_images():
    mesh = make_mesh(MeshConfig())
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    packed, _ = draw(5, batch=8)
    gradient = jax.jit(
        lambda packed, cotangent: pallas_attention.fused_gradient(packed, cotangent, 2),
        in_shardings=(rows, rows),
    )
    cotangent = packed[..., :128]
    with split_over(mesh):
        assert "all-gather" not in gradient.lower(packed, cotangent).compile().as_text()
        ours = gradient(packed, cotangent)
    assert ours.sharding.is_equivalent_to(rows, 3)


def test_devices_take_their_own_images():
    mesh = make_mesh(MeshConfig())
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    packed, qkv = draw(5, batch=8)
    bias = jnp.linspace(0.0, 1.0, 40).reshape(8, 5)
    forward = jax.jit(
        lambda packed, bias: attention.by_tpu_kernel((packed,), bias, 2),
        in_shardings=(rows, rows),
    )
    with split_over(mesh):
        assert "all-gather" not in forward.lower(packed, bias).compile().as_text()
        ours = forward(packed, bias)
    assert ours.sharding.is_equivalent_to(rows, 3)
    agree(ours, by_products(*qkv, bias).reshape(8, 5, -1), 0.02)


def test_several_tpus_have_to_say_how_they_share(calls, monkeypatch):
    packed, qkv = draw(5, batch=8)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    attend(*qkv, packed=packed)
    assert not calls
    with split_over(make_mesh(MeshConfig())):
        attend(*qkv, packed=packed)
    assert calls == [1]
