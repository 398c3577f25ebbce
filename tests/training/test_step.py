import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

from tdm_jax.data import make_config
from tdm_jax.models import attention
from tdm_jax.models.registry import create_model
from tdm_jax.ops.platform import in_reverse_mode
from tdm_jax.parallel import sharding
from tdm_jax.parallel.sharding import MeshConfig
from tdm_jax.training.losses import DistillConfig
from tdm_jax.training.step import (
    Recipe,
    eval_step,
    init_state,
    lower_eval_step,
    lower_train_step,
)
from tdm_jax.training.step import train_step as _train_step

train_step = jax.jit(_train_step, static_argnums=0)

SIZE, CLASSES, BATCH = 16, 5, 16
COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


def make_model(reducer="none", **overrides):
    sizes = {"image_size": SIZE, "patch_size": 4, "width": 32, "depth": 2, "num_heads": 2}
    settings = {"layers": (1,), "keep_rate": 0.5} if reducer != "none" else {}
    return create_model("vit", reducer, **settings, num_classes=CLASSES, **sizes | overrides)


def make_recipe(model=None, **changes):
    data = {"mixup": 0.8, "cutmix": 1.0, "erasing": 0.25}
    data_config = make_config(
        name="digits", image_size=SIZE, batch_size=BATCH, channels=3, mean=(0.5,) * 3,
        std=(0.5,) * 3,
        **data | changes.pop("data", {}),
    )  # fmt: skip
    schedule = optax.schedules.constant_schedule(1e-2)
    recipe = Recipe(
        model=model or make_model(drop_path=0.2),
        optimizer=optax.adamw(schedule),
        schedule=schedule,
        data_config=data_config,
        num_classes=CLASSES,
        seed=3,
    )
    return dataclasses.replace(recipe, **changes)


def random_variables(model, seed=0):
    return model.init(jax.random.key(seed), jnp.zeros((1, SIZE, SIZE, 3)))


def random_batch(seed=0, size=BATCH):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (size, SIZE, SIZE, 3), dtype=np.uint8),
        "label": rng.integers(0, CLASSES, size, dtype=np.int32),
    }


def run(recipe, mesh, steps=3, teacher=None):
    state = init_state(recipe, random_variables(recipe.model))
    update = lower_train_step(recipe, mesh, state, teacher).compile()
    state = jax.device_put(state, sharding.state_shardings(mesh, state))
    teacher = jax.device_put(teacher, sharding.replicated(mesh))
    values = []
    for step in range(steps):
        state, metrics = update(state, sharding.place_batch(mesh, random_batch(step)), teacher)
        values.append(jax.device_get(metrics))
    return state, values


def mesh_of(count, fsdp=1):
    return sharding.make_mesh(MeshConfig(fsdp=fsdp), jax.devices()[:count])


@pytest.fixture(scope="module")
def one_device():
    return run(make_recipe(), mesh_of(1))


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 4])
def test_the_number_of_devices_does_not_matter(fsdp, one_device, monkeypatch):
    monkeypatch.setattr(sharding, "FSDP_MIN_SIZE", 1)
    state, values = run(make_recipe(), mesh_of(8, fsdp))
    for here, alone in zip(values, one_device[1], strict=True):
        assert here["loss"] == pytest.approx(alone["loss"], abs=1e-5)
    kernel = state.variables["params"]["blocks_0"]["mlp"]["fc1"]["kernel"]
    moment = optax.tree.get(state.opt_state, "mu")["params"]["blocks_0"]["mlp"]["fc1"]["kernel"]
    for leaf in (kernel, moment):
        assert leaf.addressable_shards[0].data.shape == (32, 128 // fsdp)


@pytest.mark.slow
def test_a_step_follows_the_seed_and_its_number():
    recipe = make_recipe(make_model(depth=1, drop_path=0.2))
    state = init_state(recipe, random_variables(recipe.model))
    later = state.replace(step=state.step + 1)
    other = dataclasses.replace(recipe, seed=4)
    first, again, second, third = (
        float(train_step(*arguments, random_batch())[1]["loss"])
        for arguments in ((recipe, state), (recipe, state), (recipe, later), (other, state))
    )
    assert first == again
    assert len({first, second, third}) == 3


@pytest.mark.parametrize("reducer", ["evit", "tdm"])
def test_data_parallel_training_only_reduces_gradients(reducer):
    recipe = make_recipe(make_model(reducer, drop_path=0.2))
    mesh = mesh_of(8)
    variables = random_variables(recipe.model)
    state = init_state(recipe, variables)
    text = lower_train_step(recipe, mesh, state).compile().as_text()
    found = COLLECTIVE.findall(text)
    assert {kind for _, kind in found} == {"all-reduce"}
    # XLA reduces cls_token and its row of pos_embed once for both, and metrics as scalars; the last
    # block's keys are never made, so their bias has no gradient.
    reduced = [
        int(np.prod([int(n) for n in dims.split(",") if n]))
        for shapes, _ in found
        for dims in re.findall(r"f32\[([\d,]*)\]", shapes)
    ]
    assert (
        sum(n for n in reduced if n > 1) == sum(x.size for x in jax.tree.leaves(variables)) - 2 * 32
    )
    assert reduced.count(1) <= 2


def test_split_weights_are_gathered_and_activations_stay(monkeypatch):
    monkeypatch.setattr(sharding, "FSDP_MIN_SIZE", 1)
    recipe = make_recipe(make_model("tdm", drop_path=0.2))
    mesh = mesh_of(8, fsdp=4)
    variables = random_variables(recipe.model)
    known = {leaf.shape for leaf in jax.tree.leaves(variables)}
    # A CPU multiplies patches by their kernel as rows of pixels.
    p, _, c, d = variables["params"]["patch_embed"]["proj"]["kernel"].shape
    known.add((p, p * c, d))
    programs = (
        lower_train_step(recipe, mesh, init_state(recipe, variables)),
        lower_eval_step(recipe.model, recipe.data_config, BATCH, mesh, variables),
    )
    for program in programs:
        found = COLLECTIVE.findall(program.compile().as_text())
        assert {kind for _, kind in found} <= {"all-gather", "all-reduce", "reduce-scatter"}
        assert "all-gather" in {kind for _, kind in found}
        for shapes, _ in found:
            for dims in re.findall(r"f32\[([\d,]*)\]", shapes):
                shape = tuple(int(n) for n in dims.split(",") if n)
                # A parameter, a part of one, or a sum for the metrics; nothing of a batch.
                assert any(is_part(shape, whole) for whole in known) or not shape, shape


def draws(jaxpr) -> int:
    inner = (jaxprs_in_params(equation.params) for equation in jaxpr.eqns)
    nested = sum(draws(each) for each in itertools.chain.from_iterable(inner))
    return nested + sum(equation.primitive.name == "random_bits" for equation in jaxpr.eqns)


@pytest.mark.parametrize("depth", [2, 4])
def test_a_step_draws_at_once(depth):
    """Each draw is a loop to compile: boxes, noise, mixing, and drop path of all blocks."""
    recipe = make_recipe(make_model(depth=depth, drop_path=0.2))
    state = init_state(recipe, random_variables(recipe.model))
    program = jax.make_jaxpr(functools.partial(_train_step, recipe))(state, random_batch())
    assert draws(program.jaxpr) == 4


def is_part(shape, whole):
    """Whether an array could be a part of a parameter, transposed or not."""
    return len(shape) == len(whole) and any(
        all(n % m == 0 for n, m in zip(whole, order, strict=True))
        for order in itertools.permutations(shape)
    )


@pytest.mark.parametrize("reducer", ["evit", "tdm"])
def test_evaluation_does_not_communicate_but_for_its_sums(reducer):
    model = make_model(reducer)
    recipe = make_recipe(model)
    text = lower_eval_step(
        model, recipe.data_config, BATCH, mesh_of(8), random_variables(model)
    ).compile()
    found = COLLECTIVE.findall(text.as_text())
    assert {kind for _, kind in found} == {"all-reduce"}
    assert all(not dims for shapes, _ in found for dims in re.findall(r"\[([\d,]*)\]", shapes))


def test_accumulation_is_the_big_batch():
    plain = make_recipe(make_model(depth=1))
    whole, first = run(plain, mesh_of(2), steps=2)
    parts, second = run(dataclasses.replace(plain, accumulate=4), mesh_of(2), steps=2)
    for values, expected in zip(first, second, strict=True):
        assert values["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert values["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    # Two updates of up to 1e-2: where a gradient is nearly 0, rounding says how far Adam goes.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=3e-4), whole.variables, parts.variables
    )


def test_the_average_follows_the_weights():
    recipe = make_recipe(make_model(depth=1), ema_decay=0.9)
    state = init_state(recipe, random_variables(recipe.model))
    after, _ = train_step(recipe, state, random_batch())
    expected = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, state.variables, after.variables)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), after.ema, expected)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_masters():
    recipe = make_recipe(make_model(dtype=jnp.bfloat16))
    state = init_state(recipe, random_variables(recipe.model))
    text = train_step.lower(recipe, state, random_batch()).as_text()
    # The products with weights; attention's softmax, and what flows back through it, is float32.
    lines = [line for line in text.splitlines() if "batching_dims" not in line]
    pair = r"dot_general.*: \(tensor<[\dx]*x(\w+)>, tensor<[\dx]*x(\w+)>\)"
    products = re.findall(pair, "\n".join(lines))
    assert ("bf16", "bf16") in products
    assert ("f32", "f32") not in products
    after, values = jax.eval_shape(lambda s: train_step(recipe, s, random_batch()), state)
    assert {leaf.dtype for leaf in jax.tree.leaves(after.variables)} == {jnp.dtype("float32")}
    assert values["loss"].dtype == jnp.float32


def test_rematerialisation_changes_nothing_but_memory(one_device):
    _, values = run(make_recipe(make_model(drop_path=0.2, remat=True)), mesh_of(1))
    for here, expected in zip(values, one_device[1], strict=True):
        assert here["loss"] == pytest.approx(expected["loss"], abs=1e-5)


@pytest.mark.parametrize(("kind", "distilled"), [("hard", True), ("soft", False)])
def test_a_teacher_weighs_in(kind, distilled):
    model = make_model(depth=1, distilled=distilled)
    teacher = make_model(depth=1)
    config = DistillConfig(kind=kind, teacher="given", weight=0.25)
    recipe = make_recipe(model, distill=config, teacher=teacher)
    state = init_state(recipe, random_variables(model))
    _, values = train_step(recipe, state, random_batch(), random_variables(teacher, seed=1))
    values = {name: float(value) for name, value in values.items()}
    expected = 0.75 * values["cross_entropy"] + 0.25 * values["distillation"]
    assert values["loss"] == pytest.approx(expected, rel=1e-5)
    assert values["distillation"] > 0.0


def test_a_model_teaches_itself_to_merge_any_number_of_tokens():
    model = create_model(
        "vit", "tocom", r=4, dim=16, scale=1.0, image_size=SIZE, patch_size=4, width=32, depth=2,
        num_heads=2, num_classes=CLASSES,
    )  # fmt: skip
    variables = random_variables(model)
    # As if trained: fresh logits hardly depend on the image.
    variables["params"]["head"]["kernel"] *= 50
    masks = {"params": {name: name == "reducer" for name in variables["params"]}}
    optimizer = optax.masked(optax.adam(1e-2), masks)
    recipe = make_recipe(
        model,
        data={"mixup": 0.0, "cutmix": 0.0, "erasing": 0.0},
        distill=DistillConfig(kind="soft", teacher="given", weight=1.0),
        teacher=model.clone(reducer=model.reducer.of_teacher()),
        optimizer=optax.chain(optimizer, optax.masked(optax.set_to_zero(), jax.tree.map(
            lambda x: not x, masks
        ))),
    )  # fmt: skip
    state, batch = init_state(recipe, variables), random_batch()
    told = []
    for _ in range(60):
        state, values = train_step(recipe, state, batch, variables)
        told.append(float(values["loss"]))
    assert np.mean(told[-20:]) < 0.8 * np.mean(told[:20])
    after = state.variables["params"]
    for name, module in variables["params"].items():
        same = jax.tree.map(lambda x, y: bool((x == y).all()), module, after[name])
        assert jax.tree.all(same) == (name != "reducer")


def test_training_learns_a_batch_by_heart():
    clean = {"mixup": 0.0, "cutmix": 0.0, "erasing": 0.0, "label_smoothing": 0.0}
    recipe = make_recipe(make_model("evit"), data=clean)
    recipe = dataclasses.replace(recipe, optimizer=optax.adamw(3e-3))
    state = init_state(recipe, random_variables(recipe.model))
    batch = random_batch()
    for _ in range(60):
        state, values = train_step(recipe, state, batch)
    assert values["loss"] < 0.1
    masked = jax.tree.map(jnp.asarray, batch | {"mask": np.ones(BATCH, np.float32)})
    sums = eval_step(recipe.model, state.variables, masked, recipe.data_config)
    assert sums["top1"] == BATCH


def test_a_training_step_alone_is_traced_for_reverse_mode(monkeypatch):
    traced, attend = [], attention.attend

    def recorded(*arguments, **names):
        traced.append(in_reverse_mode())
        return attend(*arguments, **names)

    monkeypatch.setattr(attention, "attend", recorded)
    recipe, mesh = make_recipe(make_model()), mesh_of(1)
    state = jax.eval_shape(lambda: init_state(recipe, random_variables(recipe.model)))
    lower_eval_step(recipe.model, recipe.data_config, BATCH, mesh, state.variables)
    assert set(traced) == {False}
    traced.clear()
    lower_train_step(recipe, mesh, state)
    assert set(traced) == {True}
