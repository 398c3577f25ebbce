"""Probes of frozen features: against scikit-learn, and the command that makes a classifier.

Covers tdm_jax.probe.
"""

import json

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from tdm_jax import evaluate, load_pretrained
from tdm_jax import probe as command
from tdm_jax.analysis import probe
from tdm_jax.analysis.features import Features
from tdm_jax.checkpoint import describe, save_model
from tdm_jax.errors import InputError
from tests import commands

CLASSES = 4


def draw(n, seed, noise=1.5):
    """Clouds around four centres, some channels much larger than others."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(7).normal(size=(CLASSES, 12))
    labels = rng.integers(CLASSES, size=n)
    values = (centres[labels] + noise * rng.normal(size=(n, 12))) * np.logspace(-1, 1, 12) + 3
    return Features(values.astype(np.float32), labels.astype(np.int32))


@pytest.fixture(scope="module")
def train():
    return draw(600, 0)


@pytest.fixture(scope="module")
def test():
    return draw(400, 1)


def test_neighbours_vote_as_the_protocol_says(train, test, monkeypatch):
    monkeypatch.setattr(probe, "_BANK", 128)
    monkeypatch.setattr(probe, "_QUERIES", 64)
    right = probe.nearest_neighbours(train, test, CLASSES)

    def weights(distances):
        return np.exp((1 - distances) / 0.07)

    known = KNeighborsClassifier(20, metric="cosine", algorithm="brute", weights=weights)
    expected = known.fit(train.values, train.labels).predict(test.values) == test.labels
    assert (right == expected).mean() > 0.995
    assert probe.nearest_neighbours(Features(*(a[:5] for a in train)), test, CLASSES).mean() > 0.2


@pytest.mark.parametrize("penalty", [1e-1, 1e-3])
def test_weights_are_those_of_logistic_regression(train, test, penalty, monkeypatch):
    monkeypatch.setattr(probe, "_ROWS", 128)
    found = probe.linear_probe(train, CLASSES, penalties=(penalty,))
    mean, std = train.values.mean(axis=0), train.values.std(axis=0)
    known = LogisticRegression(C=1 / (penalty * len(train.labels)), max_iter=5000, tol=1e-8)
    known.fit((train.values - mean) / std, train.labels)
    logits = found.head(test.values)
    expected = known.decision_function((test.values - mean) / std)
    centred = [x - x.mean(axis=1, keepdims=True) for x in (logits, expected)]
    np.testing.assert_allclose(*centred, atol=0.02)


def test_the_penalty_is_the_best_on_what_was_held_out(train):
    # Many channels that say nothing: a weak penalty learns them by heart.
    rng = np.random.default_rng(3)
    noisy = Features(
        np.concatenate([train.values[:120], rng.normal(size=(120, 200))], 1).astype(np.float32),
        train.labels[:120],
    )
    notes = []
    found = probe.linear_probe(noisy, CLASSES, penalties=(1.0, 1e-6), note=notes.append)
    assert set(found.held_out) == {1.0, 1e-6} and len(notes) == 2
    assert found.held_out[found.penalty] == max(found.held_out.values())


def test_a_channel_that_never_changes_is_no_trouble(train):
    still = Features(np.pad(train.values, ((0, 0), (0, 1)), constant_values=2.0), train.labels)
    head = probe.linear_probe(still, CLASSES, penalties=(1e-2,)).head
    assert np.isfinite(head.kernel).all() and np.isfinite(head.bias).all()


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "distilled"])
def saved(request, tiny_model, tmp_path_factory):
    model, variables = tiny_model(
        image_size=28, patch_size=7, in_channels=1, num_classes=0, distilled=request.param
    )
    path = tmp_path_factory.mktemp("probe") / "tiny"
    save_model(path, describe(model), variables)
    return path


def run(saved, tmp_path, *more):
    own = (f"--checkpoint={saved}", f"--features={tmp_path / 'features'}", "--eval_batch_size=256")
    commands.run(command, *own, *more)


@pytest.mark.slow
def test_the_command_makes_a_classifier(saved, tmp_path, capsys):
    output = tmp_path / "classifier"
    run(saved, tmp_path, "--data=digits", f"--output={output}")
    (row,) = json.loads((output / "probe.json").read_text())["rows"]
    low, high = row["top1_interval"]
    assert 30 < low < row["top1_percent"] < high and row["knn_percent"] > 30
    assert (output / "probe.md").read_text() in capsys.readouterr().out
    assert load_pretrained(output)[0].num_classes == 10
    rows = tmp_path / "rows.json"
    commands.run(evaluate, f"--checkpoint={output}", "--data=digits", f"--output={rows}")
    assert json.loads(rows.read_text())["rows"][0]["top1_percent"] == row["top1_percent"]
    with pytest.raises(InputError, match="exists"):
        run(saved, tmp_path, "--data=digits", f"--output={output}")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "a probe learns from images; expected --data"),
        (("--data=photos", "--data_dir=x"), "photos have no classes to learn"),
        (("--data=digits", "--keep_rate=0.7,0.5", "--reducer=tdm"), "expected one --keep_rate"),
        (("--data=digit",), "unknown data.name 'digit'; did you mean 'digits'"),
    ],
)
def test_bad_input(saved, tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        run(saved, tmp_path, *flags, f"--output={tmp_path / 'out'}")
