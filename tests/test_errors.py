"""An unknown name is answered with its nearest neighbours, in one line."""

from tdm_jax.errors import InputError, unknown


def test_the_nearest_names_come_first():
    error = unknown("reducer", "toopk", ["tome", "topk", "evit"])
    assert isinstance(error, InputError)
    assert str(error) == (
        "unknown reducer 'toopk'; did you mean 'topk'? expected one of: evit, tome, topk"
    )


def test_nothing_near():
    assert str(unknown("model", 7, ["vit"])) == "unknown model 7; expected one of: vit"


def test_too_many_for_a_line():
    error = unknown("model", "vit", ["vit_a", "vit_b"], "list_models()")
    assert str(error).endswith("? expected one of list_models()")
