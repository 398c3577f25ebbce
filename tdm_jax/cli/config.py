"""The flag --config: a file below the working folder or, where it has none, one that ships."""

from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags
from ml_collections.config_flags.config_flags import ConfigFileFlagParser

from tdm_jax.errors import InputError

flags.disclaim_key_flags()  # --help counts the flag among those of the command that defines it
# Holds configs/, in a checkout by a link.
PACKAGE = Path(__file__).parents[1]


class _Parser(ConfigFileFlagParser):
    def parse(self, path: str) -> Any:
        name = path.partition(":")[0]  # what is behind it is an argument of `get_config`
        if Path(name).is_file():
            return super().parse(path)
        if (PACKAGE / name).is_file():
            return super().parse(str(PACKAGE / path))
        ships = sorted(f"configs/{file.name}" for file in (PACKAGE / "configs").glob("*.py"))
        raise InputError(f"no file {name}; expected a file of yours, or {', '.join(ships)}")


def define_config(
    default: str | None, help_text: str, flag_values: flags.FlagValues = flags.FLAGS
) -> None:
    """Defines --config, and --config.key for each key of what the file's `get_config()` returns."""
    # A method has settings that no file lists; what nobody knows is refused when it is read.
    config_flags.DEFINE_config_file(
        "config", None, help_text, flag_values, lock_config=False, accept_new_attributes=True
    )
    flag_values["config"].parser = _Parser("config", lock_config=False)
    flag_values.set_default("config", default)
