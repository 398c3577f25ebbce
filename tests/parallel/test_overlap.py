"""Host and devices at work at the same time: what waits for what, and what the clock finds."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax.parallel import overlap
from tdm_jax.parallel.overlap import Clock, ahead


class Answer:
    """Of a slow device to a batch: there when it is told so."""

    def __init__(self, number, events):
        self.number, self.ready, self._events = number, threading.Event(), events

    def copy_to_host_async(self):
        pass

    def __array__(self, dtype=None, copy=None):
        self._events.append(("waits for", self.number))
        assert self.ready.is_set()
        return np.asarray(self.number)


def test_the_next_batch_is_asked_for_before_the_last_ones_answers_are_fetched(monkeypatch):
    """Defect: whoever fetches first leaves the device without work while images are decoded."""

    def wait(tree):
        return tree.ready.wait(10) if isinstance(tree, Answer) else True

    monkeypatch.setattr(overlap.jax, "block_until_ready", wait)
    events, asked = [], []

    def read():
        for number in range(4):
            events.append(("reads", number))
            yield np.full(2, number)

    def answer(batch, placed):
        # At most one is under way beside this one.
        assert all(before.ready.is_set() for before in asked[:-1])
        events.append(("asks", int(placed[0])))
        asked.append(Answer(int(placed[0]), events))
        if len(asked) > 1:
            asked[-2].ready.set()
        return asked[-1]

    for batch, found in ahead(read(), lambda batch: batch, answer):
        events.append(("hands on", int(batch[0])))
        assert int(found) == batch[0]
        if batch[0] == 2:
            asked[-1].ready.set()
    expected = [("reads", 0), ("asks", 0)]
    for number in range(1, 4):
        expected += [("reads", number), ("asks", number)]
        expected += [("waits for", number - 1), ("hands on", number - 1)]
    assert events == [*expected, ("waits for", 3), ("hands on", 3)]


def test_the_clock_tells_computing_from_transfers_and_from_waiting(monkeypatch):
    """By a script: transfers of 1 s, programs of 4 s, and from the third batch on a slow host."""
    now = [0.0]
    monkeypatch.setattr(overlap.time, "perf_counter", lambda: now[0])
    finished = {"placed 0": 1, "answer 0": 5, "placed 1": 3, "answer 1": 9}
    finished |= {"placed 2": 21, "answer 2": 25}

    def wait(event):
        now[0] = max(now[0], finished[event[0]])

    monkeypatch.setattr(overlap.jax, "block_until_ready", wait)
    clock = Clock()
    for number, start in enumerate((0, 2, 20)):
        clock.sends(start, (f"placed {number}", np.zeros(3)))
        clock.asks((f"answer {number}",))
    monkeypatch.setattr(overlap.jax.tree, "leaves", lambda tree: tree[1:])
    with clock.running():
        pass
    road = clock.road
    assert (road.images, road.seconds) == (6, 20)
    # The second batch came while the first was computed; the third was late, and so its transfer.
    assert (road.program_seconds, road.transfer_seconds) == (8, 1)
    assert road.rates()["device_busy"] == 0.4
    # Of a wait for the first answers only what came after them counts.
    now[0] = 3.0
    with clock.waiting("answers"):
        now[0] = 9.0
    with clock.waiting("data"):
        now[0] = 15.0
    assert (clock.road.answer_seconds, clock.road.data_seconds) == (4, 6)
    assert "0.3 images/s, 0.8 while devices computed; devices: 40.0% computing" in str(road)


def test_one_batch_tells_nothing_and_an_error_is_raised_once():
    clock, threads = Clock(), threading.active_count()
    double = jax.jit(lambda x: 2 * x)
    (pair,) = ahead([np.ones(3)], jax.device_put, lambda _, x: double(x), clock)
    np.testing.assert_array_equal(pair[1], 2 * np.ones(3))
    assert clock.road is None

    def fails(_, placed):
        raise ValueError("no answer")

    with pytest.raises(ValueError, match="no answer"):
        list(ahead([np.ones(3)], jax.device_put, fails))
    assert threading.active_count() == threads


def test_what_is_not_wanted_any_more_is_given_up():
    def read():
        while True:
            yield np.ones(3)

    threads = threading.active_count()
    answered = ahead(read(), jax.device_put, lambda _, x: jnp.sum(x))
    next(answered)
    answered.close()
    assert threading.active_count() == threads
