import dataclasses

import pytest

from tdm_jax.errors import InputError
from tdm_jax.parsing import parse


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 1.0
    on: bool = False


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str
    count: int | None = None
    pair: tuple[int, int] = (1, 2)
    rates: tuple[float, ...] = ()
    inner: Inner = dataclasses.field(default_factory=Inner)
    free: dict = dataclasses.field(default_factory=dict)


def test_values_become_what_the_fields_say():
    outer = parse(
        Outer,
        {"name": "x", "pair": [3, 4], "rates": [1, 0.5], "inner": {"rate": 2}, "free": {"a": []}},
    )
    assert outer == Outer("x", None, (3, 4), (1.0, 0.5), Inner(2.0), {"a": []})
    assert isinstance(outer.inner.rate, float)
    assert isinstance(outer.rates[0], float)
    assert parse(Outer, {"name": "x", "count": 3, "inner": Inner(3.0)}).inner == Inner(3.0)
    assert parse(Outer, {"name": "x", "count": None}) == Outer("x")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "data.name is missing; expected a string"),
        ({"nam": "x"}, "unknown configuration key 'data.nam'; did you mean 'data.name'"),
        ({"inner": {"rat": 1.0}}, "'data.inner.rat'; did you mean 'data.inner.rate'"),
        ({"name": None}, "data.name: got None, expected a string"),
        ({"count": 1.5}, "data.count: got 1.5, expected an integer or None"),
        ({"count": True}, "data.count: got True, expected an integer"),
        ({"pair": (1, 2, 3)}, "data.pair: got (1, 2, 3), expected a pair of integers"),
        ({"rates": 1.0}, "data.rates: got 1.0, expected a tuple of numbers"),
        ({"rates": (1.0, "y")}, "data.rates[1]: got 'y', expected a number"),
        ({"inner": 3}, "data.inner: got 3, expected a mapping"),
        ({"inner": {"on": 1}}, "data.inner.on: got 1, expected true or false"),
        ({"free": ()}, "data.free: got (), expected a mapping"),
    ],
)
def test_what_does_not_fit_is_named(values, message):
    with pytest.raises(InputError) as caught:
        parse(Outer, ({"name": "x"} if values else {}) | values, "data.")
    assert message in str(caught.value)
