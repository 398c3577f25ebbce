import dataclasses

import pytest
from ml_collections import ConfigDict

from tdm_jax.errors import InputError
from tdm_jax.training.config import Settings, default_config, parse


def test_the_defaults_are_those_of_the_source():
    config = default_config(name="digits")
    settings = parse(config)
    assert settings.data.image_size == (28, 28)
    assert settings.optim.learning_rate == 5e-4
    assert settings.reducer == {"name": "none", "keep_rate": None, "layers": None}
    assert default_config(name="folder").data.image_size == (224, 224)
    assert parse(ConfigDict(dataclasses.asdict(settings))) == settings


def test_the_data_have_the_seed_of_the_experiment_unless_they_have_their_own():
    config = default_config(name="digits")
    config.seed = 3
    assert parse(config).data.seed == 3
    config.data.seed = 5
    assert parse(config).data.seed == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim.learning_rat": 1e-3}, "'optim.learning_rat'; did you mean 'optim.learning_rate'"),
        ({"optim.learning_rate": "fast"}, "optim.learning_rate: got 'fast', expected a number"),
        ({"data.batchsize": 3}, "'data.batchsize'; did you mean 'data.batch_size'"),
        ({"eval.keep_rates": (0.5, "x")}, r"eval.keep_rates\[1\]: got 'x', expected a number"),
        ({"accumulate": 0}, "accumulate must be at least 1"),
        ({"profile_steps": (3, 1)}, r"profile_steps must be \(first, last\)"),
    ],
)
def test_what_cannot_be_is_named_with_its_whole_key(changes, message):
    config = ConfigDict(default_config(name="digits").to_dict(), type_safe=False)
    config.update_from_flattened_dict(changes)
    with pytest.raises(InputError, match=message):
        parse(config)


@pytest.mark.parametrize("name", ["model", "reducer", "data"])
def test_what_has_no_default_must_be_there(name):
    config = default_config(name="digits")
    del config[name]
    with pytest.raises(InputError, match=f"{name} is missing"):
        parse(config)
    assert name in {field.name for field in dataclasses.fields(Settings)}
