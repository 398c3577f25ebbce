"""The flag --config: a file below the working folder or, where it has none, one that ships."""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from tdm_jax.errors import InputError

flags.disclaim_key_flags()  # --help counts the flag among those of the command that defines it
# Holds configs/, in a checkout by a link.
PACKAGE = Path(__file__).parents[1]


def _located(path: str) -> str:
    """`path`, with an argument of `get_config` behind a colon or not, where its file is."""
    name = path.partition(":")[0]
    if Path(name).is_file():
        return path
    if not (PACKAGE / name).is_file():
        ships = sorted(f"configs/{file.name}" for file in (PACKAGE / "configs").glob("*.py"))
        raise InputError(f"no file {name}; expected a file of yours, or {', '.join(ships)}")
    return str(PACKAGE / path)


def define_config(
    default: str | None, help_text: str, flag_values: flags.FlagValues = flags.FLAGS
) -> None:
    """Defines --config, and --config.key for each key of what the file's `get_config()` returns."""
    config_flags.DEFINE_config_file("config", None, help_text, flag_values)
    parser = flag_values["config"].parser
    load = parser.parse
    parser.parse = lambda path: load(_located(path))
    flag_values.set_default("config", default)
