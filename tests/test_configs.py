import importlib
from pathlib import Path

import pytest

from tdm_jax.training import optim
from tdm_jax.training.config import parse
from tdm_jax.training.experiment import reducer_of
from tdm_jax.training.keep_rate_schedule import phases

NAMES = sorted(path.stem for path in (Path(__file__).parents[1] / "configs").glob("*.py"))
EXPERIMENTS = [name for name in NAMES if name != "deit"]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_config_parses_and_says_how_to_run_it(name):
    module = importlib.import_module(f"configs.{name}")
    settings = parse(module.get_config())
    reducer_of(settings.reducer)
    for part in (f"--config=configs/{name}.py", "Hardware:", "Time:", "Top-1"):
        assert part in module.__doc__


def test_the_papers_recipe_from_scratch():
    settings = parse(importlib.import_module("configs.deit_small_scratch").get_config())
    per_epoch = 1_281_167 / 2048
    schedule = optim.learning_rate(
        settings.optim, batch_size=2048, steps=round(300 * per_epoch), steps_per_epoch=per_epoch
    )
    assert schedule(round(5 * per_epoch)) == pytest.approx(2e-3)
    assert schedule(round(300 * per_epoch)) == pytest.approx(1e-5, rel=1e-3)
    data = settings.data
    assert (data.mixup, data.cutmix, data.mix_switch, data.label_smoothing) == (0.8, 1.0, 0.5, 0.1)
    assert (data.rand_augment, data.erasing, data.repeats) == ("rand-m9-mstd0.5-inc1", 0.25, 3)
    way = phases(settings.keep_warmup, reducer_of(settings.reducer), steps_per_epoch=per_epoch)
    assert way[0].keep_rate == 1.0
    assert way[1].start > 10 * per_epoch
    assert way[-1].keep_rate == 0.7
    assert way[-1].start < 110 * per_epoch


def test_the_papers_recipe_for_fine_tuning():
    settings = parse(importlib.import_module("configs.deit_small_finetune").get_config())
    schedule = optim.learning_rate(
        settings.optim, batch_size=1024, steps=1000, steps_per_epoch=1000 / 30
    )
    assert schedule(0) == pytest.approx(4e-5)
    assert schedule(1000) == pytest.approx(2e-6, rel=1e-3)
    assert settings.optim.weight_decay == 1e-6
    assert settings.distill.kind == "none"
