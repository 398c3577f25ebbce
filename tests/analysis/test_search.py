"""The search of the space: budgets, halving, the schedule, and that nothing is measured twice.

Covers tdm_jax.search.
"""

import itertools

import numpy as np
import pytest

from tdm_jax import load_pretrained
from tdm_jax import search as command
from tdm_jax.analysis import costs
from tdm_jax.analysis import search as searching_module
from tdm_jax.analysis.candidate import Candidate, parse_method
from tdm_jax.analysis.fidelity import Fidelity, Photographs
from tdm_jax.analysis.search import Measurements, Search, Trial, allocate, macs_of_latency
from tdm_jax.analysis.timing import Spread, Timing
from tdm_jax.checkpoint import describe, save_model
from tdm_jax.data import make_config
from tdm_jax.errors import InputError
from tdm_jax.reduction import describe_reducer, make_reducer, plan
from tests import commands

GRID = {
    "layers": ("all", "quarters"),
    "protected": (0.3, 0.0),
    "grouping": ("bipartite",),
    "metric": ("tokens",),
    "average": ("size",),
    "proportional_attention": (True,),
}


class Planted(Measurements):
    """Stands in for measuring: what a trial loses is planted, and who was asked is remembered."""

    def __init__(self, loss, count=27):
        self.loss, self.count, self.asked = loss, count, []

    def __len__(self):
        return self.count

    def __call__(self, trial, count):
        self.asked.append((trial, count))
        cosine = np.full(count, 1 - self.loss(trial))
        return Fidelity(None, cosine, 1 - cosine, np.ones(count), np.zeros(count))


@pytest.fixture
def candidate(tiny_model):
    model, variables = tiny_model(depth=4, image_size=32)
    return Candidate("tiny", "none", None, model, variables)


@pytest.fixture
def whole(candidate):
    return costs.multiply_adds(candidate.model)


def searching(candidate, macs, loss):
    return Search(candidate, Planted(loss), Planted(loss), int(macs))


def protected(trial):
    return dict(trial.settings).get("protected", 1.0)


def test_every_trial_meets_the_budget_closely(candidate, whole):
    search = searching(candidate, 0.8 * whole, lambda trial: 0.0)
    trials = list(search.trials(GRID))
    assert len(trials) == 4
    for trial in trials:
        macs = costs.multiply_adds(candidate.model.clone(reducer=trial.reducer))
        assert 0.74 * whole < macs <= 0.8 * whole
        # The description is what every command takes.
        name, settings = parse_method(trial.description)
        assert describe_reducer(make_reducer(name, **settings)) == describe_reducer(trial.reducer)


@pytest.mark.slow
def test_halving_drops_the_worst_early_and_keeps_the_best(candidate, whole):
    grid = GRID | {"protected": tuple(np.linspace(0, 0.9, 10).round(2).tolist())}
    search = searching(candidate, 0.8 * whole, lambda trial: 1 - protected(trial))
    trials = list(search.trials(grid))
    best = search.halving(trials)
    assert protected(best[0]) == max(map(protected, trials)) >= 0.8
    asked = [count for _, count in search.chosen.asked]
    assert asked.count(27) < len(trials) / 2 and asked.count(min(asked)) == len(trials)
    assert len({trial for trial, count in search.chosen.asked if count == 27}) >= 4


@pytest.mark.slow
def test_rows_are_the_finalists_published_methods_and_no_reduction(candidate, whole):
    search = searching(candidate, 0.8 * whole, protected)
    rows = search(GRID)
    assert protected(Trial.of(*parse_method(rows[0].description))) == 0.0
    assert [row.method for row in rows[-3:]] == ["evit", "random", "none"]
    assert all(row.macs <= 0.8 * whole for row in rows[:-1])
    assert rows[-1].macs == whole and rows[-1].description is None
    # What is reported was not chosen by.
    assert {count for _, count in search.unseen.asked} == {27}


def test_an_ablation_moves_one_axis_at_a_time(candidate, whole):
    search = searching(candidate, 0.8 * whole, protected)
    first, *moved = search.ablation(next(iter(search.trials(GRID))))
    assert first.description.startswith("tdm/")
    axes = [row.description.partition("=")[0] for row in moved]
    assert {"importance", "protected", "grouping", "metric", "average"} <= set(axes)
    assert "protected=0.3" not in [row.description for row in moved]


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.75, 0.9])
def test_the_schedule_is_the_cheapest_sum_of_losses(candidate, whole, share):
    model, layers = candidate.model, (1, 2, 3)
    trial = Trial.of("tdm", {"layers": layers, "protected": 0.0, "grouping": "density_peaks"})
    shares = np.linspace(0, 0.9, 10)
    lost = {
        layer: tuple(zip(shares, weight * shares**2, strict=True))
        for layer, weight in zip(layers, (9.0, 3.0, 1.0), strict=True)
    }
    counts = allocate(model, trial, layers, lost, int(share * whole))

    def cost(counts):
        return costs.multiply_adds(model.clone(reducer=trial.moved(counts=counts).reducer))

    def loss(counts):
        before, total = model.shape.patches, 0.0
        for layer, count in zip(layers, counts, strict=True):
            total += np.interp(1 - count / before, *zip(*lost[layer], strict=True))
            before = count
        return total

    assert cost(counts) <= share * whole
    # A price per multiply-add finds what lies on the convex hull: close to the best there is.
    levels = range(8, 65, 4)
    triples = itertools.combinations_with_replacement(levels, 3)
    every = [tuple(sorted(triple, reverse=True)) for triple in triples]
    best = min(loss(c) for c in every if cost(c) <= share * whole)
    assert loss(counts) <= 1.25 * best
    # Early blocks lose most, so late ones remove most.
    removed = -np.diff([model.shape.patches, *counts])
    assert removed[0] <= removed[2]


@pytest.mark.parametrize("ratio", [0.8, 0.7, 0.01])
def test_time_buys_multiply_adds(candidate, whole, monkeypatch, ratio):
    # A machine that takes a tenth of the time for nothing, and the rest by multiply-adds.
    class Measured:
        def __init__(self, macs):
            self.speedup = Spread.of([1 / (0.1 + 0.9 * macs / whole)])

    monkeypatch.setattr(
        searching_module, "compile_forward", lambda model, *_: costs.multiply_adds(model)
    )
    monkeypatch.setattr(
        searching_module, "measure", lambda programs, _: [Measured(macs) for macs in programs]
    )
    if ratio < 0.1:
        with pytest.raises(InputError, match="more than 0.01 of the unreduced model's time"):
            macs_of_latency(candidate, ratio, Timing(), 8)
        return
    macs = macs_of_latency(candidate, ratio, Timing(), 8)
    assert ratio - 0.06 < 0.1 + 0.9 * macs / whole <= ratio


@pytest.mark.slow
def test_no_budget_above_or_far_below_the_model(candidate, whole):
    with pytest.raises(InputError, match="expected a budget below the"):
        searching(candidate, whole, protected)(GRID)
    with pytest.raises(InputError, match="no point of the space costs at most"):
        searching(candidate, 0.01 * whole, protected)(GRID)


def test_what_was_measured_is_not_measured_again(candidate, tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), np.uint8)
    config = make_config(name="photos", data_dir="photos", image_size=32)
    photographs = Photographs(candidate, images, config)
    measured = Measurements(candidate, photographs, "photos", tmp_path)
    trial = Trial.of("tome", {"r": 3})
    first = measured(trial, 9)
    monkeypatch.setattr(Photographs, "__call__", None)
    again = Measurements(candidate, photographs, "photos", tmp_path)(trial, 9)
    for own, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(own, other)
    other_photos = Measurements(candidate, photographs, "others", tmp_path)
    with pytest.raises(TypeError):
        other_photos(trial, 9)
    (path,) = tmp_path.iterdir()
    path.write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        measured(trial, 9)


def run(**flags):
    commands.run(command, *(f"--{name}={value}" for name, value in flags.items()))


@pytest.fixture
def saved(tiny_model, tmp_path):
    model, variables = tiny_model(image_size=28, patch_size=7, in_channels=1, num_classes=10)
    save_model(tmp_path / "tiny", describe(model), variables)
    return tmp_path / "tiny"


def test_bad_input_is_refused_before_work(saved, tmp_path):
    own = {"checkpoint": saved, "output": tmp_path / "search"}
    failing = [
        ({}, "a search compares models on images; expected --data"),
        ({"data": "digits"}, "expected one of --gmacs"),
        (
            {"data": "digits", "gmacs": "1", "macs_ratio": "0.5"},
            "expected one of --gmacs",
        ),
        ({"data": "digits", "macs_ratio": "1.5"}, "expected a budget below"),
    ]
    for settings, message in failing:
        with pytest.raises(InputError, match=message):
            run(**own, **settings)


@pytest.mark.slow
def test_the_command_writes_tables_plots_and_the_winner(saved, tmp_path, monkeypatch, capsys):
    # Every point is a program to compile.
    small = {"GRID": GRID, "PUBLISHED": ("tome",), "REFINED": {"one_sided": (0.5,)}, "FINALISTS": 1}
    small |= {"PROBED": (0.25,), "MOVES": {"average": ("uniform",)}}
    for name, value in small.items():
        monkeypatch.setattr(f"tdm_jax.analysis.search.{name}", value)
    output = tmp_path / "search"
    own = {"checkpoint": saved, "data": "digits", "macs_ratio": "0.7", "images": 8, "unseen": 8}
    run(**own, output=output, ablation=True)
    written = {path.name for path in output.iterdir()}
    assert {"search.md", "search.csv", "search.json", "search.png", "best.txt"} <= written
    assert any(name.startswith("ablation_") for name in written)
    name, settings = parse_method((output / "best.txt").read_text().strip())
    assert make_reducer(name, **settings).title == "TDM"
    assert "Agreement (%)" in capsys.readouterr().out
    shape = load_pretrained(saved)[0].shape
    assert plan(make_reducer(name, **settings), shape)[-1].out < 16
