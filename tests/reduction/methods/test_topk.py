"""Top-K: equal to its original. Its score is in test_importance, its counts in test_decoupling."""

import numpy as np
import pytest

from tdm_jax import make_reducer


@pytest.mark.golden
@pytest.mark.parametrize("keep_rate", [0.7, 0.5])
def test_equals_the_original(answer, golden, keep_rate):
    expected = golden(f"topk_keep{keep_rate}")
    logits, info = answer(make_reducer("topk", keep_rate=keep_rate))
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)
    assert [n + 1 for n in info.token_counts] == expected["tokens"].tolist()
