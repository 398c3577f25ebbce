"""The roofline against sums done by hand.

Covers tdm_jax.roofline.
"""

import json

import pytest

from tdm_jax import create_model, make_reducer
from tdm_jax import roofline as command
from tdm_jax.analysis import costs
from tdm_jax.analysis.candidate import Candidate
from tdm_jax.analysis.roofline import moved_bytes, roofline
from tests import commands

MODEL = create_model(
    "vit",
    make_reducer("topk", counts=(2,), layers=(0,)),
    image_size=8,
    patch_size=4,
    in_channels=1,
    width=8,
    depth=2,
    num_heads=2,
    num_classes=3,
)


def test_bytes_by_hand():
    # Patches 8 x 8 in, 4 tokens out; then 5 tokens in the first attention, 3 in its MLP. The last
    # block's class token reads its 3.
    activations = 64 + 4 * 8 + 5 * 11 * 8 + 3 * (3 * 8 + 2 * 32) + 3 * 8
    weights = costs.parameters(MODEL)
    assert moved_bytes(MODEL, 10, 2) == pytest.approx(2 * (activations + weights / 10))


def test_bytes_of_gates_and_of_what_pools_by_hand():
    def activations(**settings):
        model = MODEL.clone(**settings)
        return moved_bytes(model, 10, 2) - 2 * costs.parameters(model) / 10

    # All tokens go through both blocks: 5 and 3, then 3 and 3. The mean is of 2 patches.
    plain = activations(pool="avg")
    blocks = 64 + 4 * 8 + (5 + 3) * 11 * 8 + (3 + 3) * (3 * 8 + 2 * 32)
    assert plain == pytest.approx(2 * (blocks + 2 * 8))
    # The gate is written by one map and read by the other, of 3 tokens in both blocks.
    gated = activations(pool="avg", gated_mlp=True)
    assert gated - plain == pytest.approx(2 * (3 + 3) * 2 * 32)
    # Keys and values of 2 patches and the class token, and the attention to them.
    assert activations(pool="map") == pytest.approx(2 * (blocks + 3 * 5 * 8))


@pytest.mark.parametrize(
    ("peak", "bandwidth", "bound"), [(1e3, 1e12, "compute"), (1e12, 1e3, "memory")]
)
def test_the_slower_of_the_two_bounds(peak, bandwidth, bound):
    rows = roofline(
        [Candidate("tiny", "topk", None, MODEL)],
        batch_size=10,
        itemsize=2,
        peak=peak,
        bandwidth=bandwidth,
    )
    assert [row.method for row in rows] == ["none", "topk"]
    base, reduced = rows
    assert reduced.bound == bound
    seconds = reduced.operations / peak if bound == "compute" else reduced.bytes / bandwidth
    assert reduced.images_per_second == pytest.approx(1 / seconds)
    assert base.speedup == 1 < reduced.speedup
    assert reduced.intensity == pytest.approx(reduced.operations / reduced.bytes)


def test_the_command_is_the_table_of_the_documents(tmp_path, capsys):
    commands.run(command, "--models=deit_small_patch16_224", f"--output={tmp_path}")
    table = capsys.readouterr().out
    assert "| img/s at most | Speed-up at most |" in table
    assert "21\u202f905" in table  # docs/measurements.md
    written = json.loads((tmp_path / "roofline.json").read_text())
    assert written["about"]["tflops"] == 197.0
    assert [row["bound"] for row in written["rows"]] == ["memory", "memory"]
