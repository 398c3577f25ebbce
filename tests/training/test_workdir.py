import fsspec
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from tdm_jax.errors import InputError
from tdm_jax.training import workdir
from tdm_jax.training.config import default_config, parse
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
    config.update_from_flattened_dict(changes)
    return config


def test_a_run_finds_its_own_files(folder):
    mine = config()
    opened = workdir.open_workdir(str(folder), parse(mine))
    assert opened == folder
    assert workdir.settings_of(folder) is None
    assert workdir.read_result(folder) is None
    workdir.write_config(folder, mine)
    (folder / workdir.CHECKPOINTS / "1").mkdir(parents=True)
    workdir.write_whole(folder / workdir.CHECKPOINTS / "1" / "file", "")
    workdir.check_same_run(folder, mine)
    workdir.check_same_run(folder, config(log_every=7))
    with pytest.raises(InputError, match="seed is 0 there and 1 here"):
        workdir.check_same_run(folder, config(seed=1))
    assert workdir.settings_of(folder).data["name"] == "digits"
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


def test_weights_lie_in_the_model_folder_of_a_run(tmp_path):
    assert workdir.trained_model(tmp_path) == epath.Path(tmp_path)
    for item in ("params", "model"):
        (tmp_path / "model" / item).mkdir(parents=True)
    assert workdir.trained_model(tmp_path) == epath.Path(tmp_path / "model")
