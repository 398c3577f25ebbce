"""What a server is made of, without Ray: limits, images, levels, batches, programs."""

import asyncio
import dataclasses
import io
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from launch.serve import programs
from launch.serve.batching import Batcher, best_size, padded
from launch.serve.images import decode, transform_of
from launch.serve.levels import Policy, Thresholds
from launch.serve.limits import Limits, Refusal
from launch.serve.made_images import bomb, photograph
from tdm_jax import Preprocessing, export_model, make_reducer, preprocess
from tdm_jax.errors import InputError
from tdm_jax.exporting.stablehlo import Options

PREPARED = Preprocessing(crop_pct=0.875)


@pytest.fixture(scope="module")
def exports(tmp_path_factory, tiny_model):
    """Folders of one model, by what they are."""
    root = tmp_path_factory.mktemp("exports")
    cases = {
        "full": (("none",), {}, {"weights": "beside"}),
        "half": (("tdm", 0.5), {"layers": (1,)}, {"weights": "beside"}),
        "inside": (("none",), {}, {"preprocessing": True}),
        "features": (("none",), {"num_classes": 0}, {}),
        "deeper": (("tdm", 0.5), {"layers": (1,), "depth": 4}, {}),
        "unprepared": (("none",), {"preprocessing": None}, {}),
    }
    for name, (reducer, settings, options) in cases.items():
        model, variables = tiny_model(*reducer, **{"preprocessing": PREPARED} | settings)
        export_model(root / name, model, variables, Options(platforms=("cpu",), **options))
    return root


# Limits


def test_refusals_are_one_line_with_a_status():
    limits = Limits(body_bytes=10, images=2, pixels=100, aspect=5, queue=4)
    for check, arguments, status in (
        (limits.check_body, (11,), 413),
        (limits.check_images, (3,), 413),
        (limits.check_size, (11, 10), 413),
        (limits.check_size, (6, 1), 422),
        (limits.check_queue, (3, 2), 503),
    ):
        with pytest.raises(Refusal) as refused:
            check(*arguments)
        assert refused.value.status == status
        assert "\n" not in str(refused.value)
    limits.check_body(10)
    limits.check_images(2)
    limits.check_size(10, 10)
    limits.check_queue(2, 2)
    assert refused.value.headers == {"Retry-After": "1"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pixels": 0}, "limits.pixels: expected more than 0"),
        ({"queue": 8}, "at most limits.queue=8"),
    ],
)
def test_limits_that_cannot_be(settings, message):
    with pytest.raises(InputError, match=message):
        Limits(**settings)


# Images


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_image_is_prepared_as_preprocess_does(kind, exports, tiny_model):
    manifest = json.loads((exports / "full/manifest.json").read_text())
    transform, settings = transform_of(manifest)
    data = photograph(kind, (37, 61))
    ours = (decode(data, transform, Limits()) / 255 - settings.mean) / settings.std
    model, _ = tiny_model(preprocessing=PREPARED)
    np.testing.assert_allclose(ours, preprocess(model)(Image.open(io.BytesIO(data)))[0], atol=1e-5)


@pytest.mark.parametrize(
    ("data", "status", "message"),
    [
        (b"", 400, "got an empty body"),
        (b"hello", 400, "expected JPEG, PNG, WEBP; got bytes of no such image"),
        (b"GIF89a" + bytes(100), 400, "got bytes of no such image"),
        (photograph()[:9000], 400, "the JPEG image is damaged: image file is truncated"),
        (photograph("PNG", (40, 40))[:-40], 400, "the PNG image is damaged"),
        (photograph("WEBP")[:900], 400, "WEBP"),
        (bomb(5001, 5001), 413, "expected at most 25000000 pixels; got 5001x5001"),
        (bomb(10_000, 10_000), 413, "expected at most 25000000 pixels"),
        (bomb(60_000, 60_000), 413, "expected at most 25000000 pixels"),
        (photograph("PNG", (1, 60)), 422, "expected sides in a ratio of at most 50; got 60x1"),
    ],
)
def test_images_that_are_refused(data, status, message, exports):
    transform, _ = transform_of(json.loads((exports / "full/manifest.json").read_text()))
    with pytest.raises(Refusal, match=message) as refused:
        decode(data, transform, Limits())
    assert refused.value.status == status


# Levels


def test_the_level_falls_at_once_and_rises_by_steps_after_a_while():
    policy = Policy(3, Thresholds(lower_at=10, raise_at=2, hold_seconds=1.0))
    story = [  # seconds, waiting, level
        (0.0, 9, 0),
        (0.1, 25, 2),
        (0.2, 5, 2),  # between the thresholds nothing changes
        (5.0, 3, 2),
        (5.5, 2, 2),  # not for long enough
        (6.0, 2, 1),
        (6.5, 1, 1),
        (6.9, 10, 1),  # and none at its own threshold
        (7.8, 1, 1),
        (7.9, 1, 0),
        (8.0, 30, 2),
    ]
    for now, waiting, level in story:
        assert policy.choose(waiting, now) == level, now


def test_one_level_stays():
    policy = Policy(1, Thresholds())
    assert {policy.choose(waiting, waiting) for waiting in range(1000)} == {0}


def test_thresholds_that_would_swing():
    with pytest.raises(InputError, match="0 <= raise_at < lower_at"):
        Thresholds(lower_at=8, raise_at=8)


# Batches


def test_padding_where_it_is_free_and_two_batches_where_it_is_not():
    flat = {1: 1.0, 4: 1.1, 8: 1.2}
    assert [best_size(n, flat) for n in (1, 2, 5, 8, 50)] == [1, 4, 8, 8, 8]
    linear = {1: 1.0, 4: 4.0, 8: 8.0}
    assert [best_size(n, linear) for n in (1, 3, 4, 5, 7, 8)] == [1, 1, 4, 4, 4, 8]


def image(value):
    return np.full((2, 2, 3), value, np.uint8)


def test_a_padded_batch():
    batch = padded([image(3), image(5)], 4)
    assert batch[:, 0, 0, 0].tolist() == [3, 5, 0, 0]


@pytest.fixture
def batches():
    """What the next batcher ran: level, images of the batch."""
    return []


def batcher(batches, levels=1, sizes=(1, 2, 4)):
    def run(level, images):
        batches.append((level, images[:, 0, 0, 0].tolist()))
        if 99 in images:
            raise RuntimeError("broken")
        return images[:, 0, 0].astype(np.float32) + level

    return Batcher([dict.fromkeys(sizes, 1.0)] * levels, run)


def test_what_arrives_meanwhile_joins_the_next_batch(batches):
    async def story():
        work = batcher(batches)
        rows = await asyncio.gather(*(work.answer(0, image(i)) for i in range(1, 8)))
        assert work.alive
        return [row[0] for row in rows]

    assert asyncio.run(story()) == [1, 2, 3, 4, 5, 6, 7]
    assert batches == [(0, [1, 2, 3, 4]), (0, [5, 6, 7, 0])]


def test_a_batch_is_of_one_level_and_the_oldest_comes_first(batches):
    async def story():
        work = batcher(batches, levels=2)
        asked = [(1, 1), (0, 2), (1, 3)]
        rows = await asyncio.gather(*(work.answer(level, image(i)) for level, i in asked))
        return [row[0] for row in rows]

    assert asyncio.run(story()) == [2, 2, 4]
    assert [level for level, _ in batches] == [1, 0]


def test_what_was_given_up_is_not_computed(batches):
    async def story():
        work = batcher(batches)
        given_up = asyncio.ensure_future(work.answer(0, image(1)))
        await asyncio.sleep(0)
        given_up.cancel()
        return await work.answer(0, image(2))

    asyncio.run(story())
    assert batches == [(0, [2, 0, 0, 0])]


def test_a_batch_that_fails_ends_its_own_requests_alone(batches):
    async def story():
        work = batcher(batches)
        with pytest.raises(RuntimeError, match="broken"):
            await work.answer(0, image(99))
        return await work.answer(0, image(1))

    assert asyncio.run(story())[0] == 1


# Programs


def test_levels_of_one_model_compiled_ahead(exports, tiny_model):
    loaded = programs.load([str(exports / "half"), str(exports / "full")], [1, 3])
    assert [program.keep_rate for program in loaded] == [1.0, 0.5]
    assert loaded[0].weights is not None
    compiled = []

    def listen(event, seconds, **_):
        compiled.append(event) if "compile" in event else None

    jax.monitoring.register_event_duration_secs_listener(listen)
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    answers = [[program(images[:n]) for n in (1, 3)] for program in loaded]
    with pytest.raises(KeyError):
        loaded[0](images[:2])
    assert compiled == []
    for (one, three), arguments in zip(answers, (("none",), ("tdm", 0.5)), strict=True):
        settings = {} if len(arguments) == 1 else {"layers": (1,)}
        model, variables = tiny_model(*arguments, preprocessing=PREPARED, **settings)
        x = (images / 255 - np.array(PREPARED.mean)) / np.array(PREPARED.std)
        expected = jax.jit(model.apply)(variables, jnp.asarray(x, jnp.float32))
        np.testing.assert_allclose(three, expected, atol=1e-4)
        np.testing.assert_allclose(one, three[:1], atol=1e-5)


def test_an_export_that_prepares_its_images_answers_the_same(exports):
    data, answers = photograph("PNG", (40, 64)), []
    for name in ("full", "inside"):
        (program,) = programs.load([str(exports / name)], [1])
        transform, _ = transform_of(program.manifest)
        answers.append(program(decode(data, transform, Limits())[None]))
    np.testing.assert_allclose(*answers, atol=1e-4)


def test_features_and_a_keep_rate_by_name(exports):
    (program,) = programs.load([f"0.7={exports / 'features'}"], [1])
    assert program.keep_rate == 0.7
    assert program(np.zeros((1, 16, 16, 3), np.uint8)).shape == (1, 16)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ([], "expected at least one export"),
        (["nowhere"], "not readable"),
        (["unprepared"], "does not say how its images are prepared"),
        (["full", "deeper"], "differ in depth; expected one model"),
        (["full", "inside"], "expected one export of keep rate 1; got two"),
        (["full", "0.9=inside"], "differ in input; expected one model"),
        (["0.3=full", "half"], "expected fewer multiply-adds than"),
        (["2=full"], "expected a keep rate in (0, 1]; got 2"),
        (["fast=full"], "expected a keep rate in (0, 1]; got fast"),
    ],
)
def test_exports_that_are_not_one_model(folders, message, exports):
    texts = [
        "=".join([*told, str(exports / name)])
        for *told, name in (folder.split("=") for folder in folders)
    ]
    with pytest.raises(InputError, match=re.escape(message)):
        programs.read(texts)


def test_a_method_without_a_keep_rate_has_to_be_given_one(tmp_path, tiny_model):
    reducer = make_reducer("tome", r=2)
    model, variables = tiny_model(reducer, preprocessing=PREPARED)
    export_model(tmp_path / "tome", model, variables, Options(platforms=("cpu",)))
    with pytest.raises(InputError, match="goes by no keep rate; expected <rate>="):
        programs.read([str(tmp_path / "tome")])
    ((rate, _),) = programs.read([f"0.6={tmp_path / 'tome'}"])
    assert rate == 0.6


def test_settings_do_not_pass_over_what_they_do_not_know():
    assert all(
        part.__pydantic_config__ == {"extra": "forbid"} and dataclasses.is_dataclass(part)
        for part in (Limits, Thresholds)
    )
