"""The comparison: baselines, costs, accuracy, shared measurements, and what the command refuses."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax import compare as comparison
from tdm_jax import create_model, data
from tdm_jax.analysis import costs, timing
from tdm_jax.analysis.candidate import Candidate, contender, parse_method, with_baselines
from tdm_jax.analysis.timing import Timing
from tdm_jax.checkpoint import describe, save_model
from tdm_jax.compare import compare
from tdm_jax.errors import InputError
from tdm_jax.reduction import REDUCERS, StageReducer

TINY = {
    "image_size": 28,
    "patch_size": 7,
    "in_channels": 1,
    "width": 32,
    "depth": 3,
    "num_heads": 2,
    "num_classes": 10,
}
QUICK = Timing(rounds=2, min_seconds=0.0, warmup=1)


@pytest.fixture(scope="module")
def plain():
    model = create_model("vit", **TINY)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    return Candidate("tiny", "none", None, model, params)


def with_method(plain, method, keep_rate):
    model = create_model("vit", method, keep_rate, layers=(1,), **TINY)
    return Candidate(plain.name, method, keep_rate, model, plain.params)


@pytest.fixture(scope="module")
def saved(plain, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "tiny"
    save_model(path, describe(plain.model), plain.params)
    return str(path)


def test_a_baseline_is_added_first_and_only_where_there_is_none(plain):
    reduced = with_method(plain, "topk", 0.5)
    first, second = with_baselines([reduced])
    assert first.is_baseline
    assert first.params["params"].keys() == plain.params["params"].keys()
    assert second is reduced
    assert with_baselines([reduced, plain]) == [plain, reduced]


def test_models_are_grouped():
    tiny, small = (f"deit_{size}_patch16_224" for size in ("tiny", "small"))
    entries = [contender(name, "topk", rate) for rate in (0.7, 0.5) for name in (tiny, small)]
    labels = [(entry.name, entry.label) for entry in with_baselines(entries)]
    own = ["none", "topk 0.7", "topk 0.5"]
    assert labels == [(tiny, label) for label in own] + [(small, label) for label in own]


def test_rows_without_data_have_costs_and_no_accuracy():
    rows = compare([contender("deit_small_patch16_224", "evit", 0.7)])
    base, evit = (row.record() for row in rows)
    assert (base["macs"], evit["macs"]) == (4_603_567_752, 3_032_105_162)
    assert base["flops_reduction_percent"] == 0
    assert evit["flops_reduction_percent"] == pytest.approx(34.13, abs=0.01)
    assert evit["top1_percent"] is None
    assert "images_per_second" not in evit


def test_rows_with_data_and_measurement(plain):
    entries = [plain, with_method(plain, "topk", 0.5), with_method(plain, "topk", 1.0)]
    source = data.make_config(name="digits", eval_batch_size=256)
    base, half, whole = compare(entries, source=source, timing=QUICK, batch_size=2)
    assert base.verdict == timing.BASELINE
    assert base.speed.speedup.median == 1.0
    assert half.macs == costs.count(half.contender.model).macs < base.macs
    assert half.record()["speedup"] == half.speed.speedup.median > 0
    # Every baseline stands beside its contenders: the same rounds, the same machine.
    assert half.speed.baseline == base.speed.baseline
    # Keeping everything is the unreduced model, to the last digit of its accuracy.
    assert whole.top1 == base.top1
    assert 0 < base.top1 < 100


def test_contenders_of_one_model_share_a_measurement(plain):
    reduced = with_method(plain, "topk", 0.5)
    tuned = Candidate("tiny", "topk", 0.5, reduced.model, plain.params, "fine-tuned")
    said = []
    speeds = comparison.measure([plain, reduced, tuned], QUICK, batch_size=1, note=said.append)
    assert speeds[1] is speeds[2]
    assert "2 programs" in said[0]


def test_methods_with_settings():
    assert parse_method("tdm/preset=published/neighbors=5/fuse=True") == (
        "tdm",
        {"preset": "published", "neighbors": 5, "fuse": True},
    )
    entry = contender("deit_tiny_patch16_224", "topk/r=20", 0.7)
    assert entry.keep_rate is None
    assert entry.model.schedule[-1].out == 196 - 60


def test_a_keep_rate_and_layers_are_for_methods_with_stages():
    for method, reducer in REDUCERS.items():
        entry = contender("deit_tiny_patch16_224", method, 0.5, layers=(3,))
        staged = issubclass(reducer, StageReducer)
        assert entry.keep_rate == (0.5 if staged else None)
        assert not staged or entry.model.reducer.layers == (3,)


def test_a_checkpoint_is_read_once_for_all_methods(saved, plain):
    loaded = {}
    entries = [contender(saved, "topk", rate, layers=(1,), loaded=loaded) for rate in (0.7, 0.5)]
    assert len(loaded) == 1
    assert entries[0].params is entries[1].params
    images = jnp.ones((1, 28, 28, 1))
    np.testing.assert_array_equal(
        entries[0].unreduced().model.apply(entries[0].params, images),
        plain.model.apply(plain.params, images),
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: contender("deit_smal_patch16_224"), "deit_smal_patch16_224"),
        (lambda: contender("deit_tiny_patch16_224", "tdn"), "unknown reducer 'tdn'"),
        (lambda: contender("deit_tiny_patch16_224", "tdm/published"), "name/key=value"),
        (lambda: contender("deit_tiny_patch16_224", "tdm", 1.5), r"\(0, 1\]"),
        (lambda: compare([]), "nothing to compare"),
        (
            lambda: compare(
                [contender("deit_tiny_patch16_224")], source=data.make_config(name="digits")
            ),
            "name without weights",
        ),
    ],
)
def test_bad_input(wrong, message):
    with pytest.raises(InputError, match=message):
        wrong()


def test_data_of_other_classes_are_refused(plain):
    other = create_model("vit", **{**TINY, "num_classes": 7})
    entry = Candidate("other", "none", None, other, plain.params)
    with pytest.raises(InputError, match="digits has 10 classes; the model has 7"):
        compare([entry], source=data.make_config(name="digits"))


def command(*flags):
    return subprocess.run(
        [sys.executable, "-m", "tdm_jax.compare", *flags],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_writes_its_tables(saved, tmp_path):
    run = command(
        f"--models={saved}",
        "--methods=topk",
        "--keep_rates=0.5",
        "--layers=1",
        "--data=digits",
        "--eval_batch_size=180",
        f"--output={tmp_path}",
    )
    assert run.returncode == 0, run.stderr
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert [row["method"] for row in written["rows"]] == ["none", "topk"]
    assert all(0 < row["top1_percent"] < 100 for row in written["rows"])
    assert written["about"]["jax"] == jax.__version__
    text = (tmp_path / "comparison.md").read_text()
    assert text == run.stdout
    assert "JAX" in text
    assert (tmp_path / "comparison.csv").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "error: no model given"),
        (("--models=deit_tiny_patch16_224", "--keep_rates=much"), "expected a number; got 'much'"),
        (("--entry=deit_tiny_patch16_224",), "MODEL:METHOD:KEEP_RATE"),
        (("--models=deit_tiny_patch16_224", "--data=digits"), "of 3 channels, as the model takes"),
    ],
)
def test_the_command_fails_in_one_line(flags, message):
    run = command(*flags)
    assert run.returncode == 2
    assert message in run.stderr
    assert run.stderr.count("\n") == 1


def test_no_method_is_known_by_name():
    for module in (comparison, candidate, timing):
        with open(module.__file__, encoding="utf-8") as file:
            code = file.read().partition('"""\n\n')[2].split("def define_flags")[0]
        for name in ("tdm", "evit", "tome", "topk", "random"):
            words = code.replace("tdm_jax", "").replace("tdm/", "").replace("jax.random", "")
            assert f'"{name}"' not in words
