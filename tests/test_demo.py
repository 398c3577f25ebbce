"""The whole road of the demo, with one method and in a few steps."""

import pytest

from configs import cluttered_digits
from tdm_jax import demo


@pytest.mark.slow
def test_demo(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "METHODS", ("tdm",))
    monkeypatch.setattr(demo, "KEEP_RATES", (0.5,))
    monkeypatch.setattr(demo, "FINE_TUNING_EPOCHS", 0.004)
    config = cluttered_digits.get_config()
    config.model.width, config.model.depth, config.reducer.layers = 16, 3, (1, 2)
    config.epochs, config.optim.warmup_epochs = 0.008, 0.0
    text = demo.demo(config, tmp_path)
    rows = [line for line in text.splitlines() if line.startswith("| cluttered digits")]
    assert [("off the shelf" in row, "fine-tuned" in row) for row in rows] == [
        (False, False), (True, False), (False, True),
    ]  # fmt: skip
    assert "top-1, the same" in text
    written = {path.name for path in tmp_path.iterdir()}
    assert written >= {"comparison.md", "timm.safetensors", "report.html", "tokens.png"}
