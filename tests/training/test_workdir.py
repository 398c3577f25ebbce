import json

import fsspec
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from ml_collections import ConfigDict

from tdm_jax.checkpoint.workdir import CHECKPOINTS
from tdm_jax.errors import InputError
from tdm_jax.models.registry import create_model
from tdm_jax.training import workdir
from tdm_jax.training.config import default_config, parse
from tdm_jax.training.experiment import make_experiment
from tdm_jax.training.metric_writer import Progress


@pytest.fixture(params=["local", "store"])
def folder(request, tmp_path, monkeypatch):
    """A folder here, and one in an object store: in memory, under the name of Google's."""
    if request.param == "local":
        return epath.Path(tmp_path / "run")
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    monkeypatch.setattr(fsspec, "filesystem", lambda *args, **kwargs: MemoryFileSystem())
    return epath.Path("gs://bucket/run")


def config(**changes):
    config = default_config(name="digits")
    sizes = {"patch_size": 7, "width": 16, "depth": 3, "num_heads": 2}
    config.model = ConfigDict({"name": "vit", "dtype": "float32", "remat": False, **sizes})
    config.epochs = 10.0
    config.update_from_flattened_dict(changes)
    return config


def saved_a_step(folder):
    step = folder / CHECKPOINTS / "1"
    step.mkdir(parents=True)
    workdir.write_whole(step / "file", "")


def test_a_run_finds_its_own_files(folder):
    settings = parse(config())
    model = make_experiment(settings, dataset=(64, 10)).model
    opened = workdir.open_workdir(str(folder), settings)
    assert opened == folder
    assert workdir.settings_of(folder) is None
    assert workdir.read_result(folder) is None
    workdir.write_start(folder, settings, model)
    saved_a_step(folder)
    workdir.check_same_run(folder, settings)
    workdir.check_same_run(folder, parse(config(log_every=7)))
    with pytest.raises(InputError, match="seed is 0 there and 1 here"):
        workdir.check_same_run(folder, parse(config(seed=1)))
    assert workdir.settings_of(folder) == settings
    description = json.loads((folder / "model.json").read_text())
    assert create_model(**description) == model.clone(drop_path=0.0)
    workdir.write_result(folder, {"top1": 50.0})
    assert workdir.read_result(folder) == {"top1": 50.0}


def test_metrics_go_on_where_the_run_does(folder):
    folder.mkdir(parents=True)
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        progress = Progress(folder, start=start, steps=4, batch_size=8)
        for step in steps:
            progress.train(step, {"loss": start + 0.5}, 0.7)
        progress.close()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == [f'{{"step": {n}' for n in (1, 2, 3, 4)]
    assert ['"loss": 2.5' in line for line in lines] == [False, False, True, True]


def test_a_run_of_an_older_version_goes_on(tmp_path, caplog):
    """Settings that it did not know have today's defaults, also what it wrote for a default."""
    now = config(**{"reducer.name": "tdm", "model.depth": 6})
    old = json.loads(now.to_json_best_effort())
    del old["accumulate"], old["optim"]["clip_norm"], old["data"]["interpolation"], old["sparse"]
    del old["model"]["remat"]
    old["reducer"] |= {"keep_rate": 0.0, "layers": []}
    old["optim"]["momentum"] = 0.9
    folder = epath.Path(tmp_path)
    workdir.write_whole(folder / workdir.CONFIG, json.dumps(old))
    saved_a_step(folder)
    workdir.check_same_run(folder, parse(now))
    assert workdir.settings_of(folder).reducer == {"name": "tdm"}
    assert "passed over what this version does not know: ['optim.momentum']" in caplog.text
    for changes, message in (
        ({"accumulate": 2}, "accumulate is 1 there and 2 here"),
        (
            {"data.interpolation": "bilinear"},
            "data.interpolation is 'bicubic' there and 'bilinear'",
        ),
        ({"model.remat": True}, "model.remat is False there and True here"),
        ({"reducer.keep_rate": 0.5}, "reducer.keep_rate is None there and 0.5 here"),
        ({"reducer.preset": "published"}, "reducer.preset is None there and 'published' here"),
    ):
        changed = now.copy_and_resolve_references()
        with changed.unlocked():
            changed.update_from_flattened_dict(changes)
        with pytest.raises(InputError, match=message):
            workdir.check_same_run(folder, parse(changed))
