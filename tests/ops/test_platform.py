"""A program holds the forms of all platforms, or of the one that was pinned."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from tdm_jax import create_model
from tdm_jax.errors import InputError
from tdm_jax.ops.platform import by_platform, pinned

SIZES = {"image_size": 32, "patch_size": 8, "width": 16, "depth": 2, "num_heads": 2}
IMAGES = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))


def primitives(jaxpr) -> Iterator[str]:
    """Names of all that a program does, programs within it included."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in jaxprs_in_params(equation.params):
            yield from primitives(inner)


@pytest.mark.parametrize("name", ["tdm", "tome"])
def test_a_pinned_program_has_no_choice_of_platform(name):
    model = create_model("vit", name, 0.5, layers=(0, 1), num_classes=3, **SIZES)
    variables = jax.jit(model.init)(jax.random.key(0), IMAGES)
    apply = jax.jit(model.apply)
    free = apply(variables, IMAGES)
    assert "platform_index" in set(primitives(jax.make_jaxpr(model.apply)(variables, IMAGES).jaxpr))
    for platform in ("cpu", "tpu", "reference"):
        with pinned(platform):
            program = jax.make_jaxpr(model.apply)(variables, IMAGES)
            np.testing.assert_allclose(apply(variables, IMAGES), free, atol=1e-5)
        assert not {"platform_index", "cond"} & set(primitives(program.jaxpr))


def test_a_jitted_function_is_traced_anew_when_a_platform_is_pinned():
    @jax.jit
    def form(x):
        return by_platform(x, reference=lambda x: x, cpu=lambda x: 2 * x, tpu=lambda x: 3 * x)

    one = jnp.ones(())
    assert form(one) == 2
    with pinned("tpu"):
        assert form(one) == 3
        with pinned("reference"):
            assert form(one) == 1
        assert form(one) == 3
    with pinned("rocm"):
        assert form(one) == 1
    assert form(one) == 2


def test_an_unknown_platform_is_refused():
    with pytest.raises(InputError, match="unknown platform 'tpv'; did you mean 'tpu'"):
        pinned("tpv")
