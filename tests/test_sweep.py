"""Sweeps: what is trained from what, what is kept, and how a killed one goes on."""

import dataclasses
import json
import signal
import types

import jax
import jax.numpy as jnp
import pytest

from tdm_jax import create_model, data
from tdm_jax import sweep as sweeping
from tdm_jax.analysis.candidate import contender
from tdm_jax.analysis.timing import Timing
from tdm_jax.checkpoint import describe, save_model
from tdm_jax.errors import InputError
from tdm_jax.sweep import sweep
from tdm_jax.training.config import default_config
from tdm_jax.training.metric_writer import Progress

SIZES = {"patch_size": 7, "width": 16, "depth": 2, "num_heads": 2}
SOURCE = data.make_config(name="digits", eval_batch_size=200)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = create_model("vit", **SIZES, image_size=28, in_channels=1, num_classes=10)
    path = tmp_path_factory.mktemp("sweep") / "tiny"
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    save_model(path, describe(model), params)
    return str(path)


@pytest.fixture
def entries(saved):
    return [contender(saved, "topk", rate, layers=(1,)) for rate in (0.75, 0.5)]


@pytest.fixture
def config():
    config = default_config(name="digits")
    config.model = {"name": "vit", **SIZES}
    config.steps = 2
    config.optim.warmup_epochs = 0.0
    config.data.eval_batch_size = 200
    return config


@pytest.fixture
def trained(monkeypatch):
    """Stands in for training: remembers what was asked, and answers with the seed."""
    asked = []

    def train(config, workdir):
        asked.append((config, workdir))
        return {"top1": 90.0 + config.seed}

    monkeypatch.setattr(sweeping, "train_to_end", train)
    return asked


def test_off_the_shelf(entries, tmp_path):
    rows = sweep(entries, SOURCE, tmp_path, timing=Timing(2, 0.0, 1), batch_size=1)
    assert [(row["method"], row["keep_rate"]) for row in rows] == [
        ("none", None),
        ("topk", 0.75),
        ("topk", 0.5),
    ]
    assert rows[0]["macs"] > rows[1]["macs"] > rows[2]["macs"]
    assert all(0 < row["top1_percent"] < 100 and row["speedup"] > 0 for row in rows)
    written = {path.name for path in tmp_path.iterdir()}
    assert {"sweep.md", "sweep.csv", "sweep.json", "points"} <= written
    plots = {f"off-the-shelf-{axis}.svg" for axis in ("keep_rate", "flops", "throughput")}
    assert plots <= written


def test_each_point_is_trained_from_the_checkpoint(entries, config, trained, tmp_path):
    rows = sweep(entries, SOURCE, tmp_path, config=config, seeds=(0, 4))
    methods = [config.reducer.to_dict() for config, _ in trained]
    topk = {"name": "topk", "layers": (1,)}
    assert methods == [{"name": "none"}] * 2 + [
        {**topk, "keep_rate": rate} for rate in (0.75, 0.75, 0.5, 0.5)
    ]
    assert {config.init_from for config, _ in trained} == {entries[0].name}
    assert [config.seed for config, _ in trained] == [0, 4] * 3
    assert len({workdir for _, workdir in trained}) == 6
    tuned = [row for row in rows if row["training"] == "fine-tuned"]
    assert [row["top1_percent"] for row in tuned] == [92.0] * 3
    assert tuned[0]["top1_spread"] == pytest.approx(8**0.5)
    assert "top1_spread" not in rows[0]


def test_a_killed_sweep_goes_on(entries, config, trained, tmp_path, monkeypatch):
    real, left = sweeping.accuracies, [2]

    def killed(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(sweeping, "accuracies", killed)
    with pytest.raises(KeyboardInterrupt):
        sweep(entries, SOURCE, tmp_path, config=config)
    finished = {path: path.read_bytes() for path in (tmp_path / "points").iterdir()}
    assert len(finished) == 2
    left[0] = 1
    sweep(entries, SOURCE, tmp_path, config=config)
    assert len(trained) == 3
    assert all(path.read_bytes() == was for path, was in finished.items())
    # What is complete is only tabulated again; another rate adds its own points.
    left[0] = 0
    sweep(entries, SOURCE, tmp_path, config=config)
    assert len(trained) == 3
    left[0] = 1
    more = contender(entries[0].name, "topk", 0.25, layers=(1,))
    sweep([*entries, more], SOURCE, tmp_path, config=config)
    assert len(trained) == 4


def test_points_of_other_checkpoints_and_layers_have_other_names(entries, tmp_path):
    one = entries[0]
    namesake = dataclasses.replace(one, name=str(tmp_path / "tiny"))
    elsewhere = contender(one.name, "topk", 0.75, layers=(0,))
    again = contender(one.name, "topk", 0.75, layers=(1,))
    names = [sweeping.Point(entry).name for entry in (one, namesake, elsewhere, again)]
    assert len(set(names)) == 3
    assert names[0] == names[3]


@pytest.mark.slow
def test_a_real_training_of_a_point(entries, config, tmp_path):
    rows = sweep(entries[1:], SOURCE, tmp_path, config=config)
    tuned = [row for row in rows if row["training"] == "fine-tuned"]
    assert [row["method"] for row in tuned] == ["none", "topk"]
    assert all(0 < row["top1_percent"] <= 100 for row in tuned)


@pytest.mark.slow
def test_a_training_that_is_told_to_stop_gives_no_result(entries, config, tmp_path, monkeypatch):
    advance = Progress.advance

    def advance_and_signal(self):
        advance(self)
        signal.raise_signal(signal.SIGTERM)

    # The stopped step is evaluated too: that is not yet the accuracy of the point.
    config.eval.every_epochs = 1e-9
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "advance", advance_and_signal)
        with pytest.raises(SystemExit, match="stopped at step 1 of .*; the same command continues"):
            sweep(entries[1:], SOURCE, tmp_path, config=config)
    assert {path.suffix for path in (tmp_path / "points").glob("*_seed0_*")} == {""}
    rows = sweep(entries[1:], SOURCE, tmp_path, config=config)
    assert [row["training"] for row in rows].count("fine-tuned") == 2


def test_another_sweep_in_the_same_folder_is_refused(entries, config, trained, tmp_path):
    sweep(entries, SOURCE, tmp_path)
    sweep(entries, SOURCE, tmp_path, config=config)
    config.steps = 3
    with pytest.raises(InputError, match=r"training.steps is 2 there and 3 here"):
        sweep(entries, SOURCE, tmp_path, config=config)
    other = data.make_config(name="digits", eval_batch_size=200, mean=(0.5,))
    with pytest.raises(InputError, match=r"another sweep: data\.mean"):
        sweep(entries, other, tmp_path)


def test_bad_input(entries, config, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="name without weights"):
        sweep([contender("deit_tiny_patch16_224")], SOURCE, tmp_path)
    sweep(entries[:1], SOURCE, tmp_path)
    (point,) = (tmp_path / "points").glob("*topk*.json")
    point.write_text("{")
    with pytest.raises(InputError, match="damaged"):
        sweep(entries[:1], SOURCE, tmp_path)
    assert json.loads((tmp_path / "sweep.json").read_text())["rows"]
    monkeypatch.setattr(sweeping.contenders, "from_flags", lambda: entries)
    for given, message in (("digits", "the data of a training"), ("", "needs data")):
        flags = types.SimpleNamespace(
            data=given,
            data_dir="",
            split="",
            eval_batch_size=1,
            config=config if given else None,
            output="",
        )
        monkeypatch.setattr(sweeping.flags, "FLAGS", flags)
        with pytest.raises(InputError, match=message):
            sweeping.main()
