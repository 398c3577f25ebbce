"""The flag --config: a file below the working folder or, where it has none, one that ships."""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

flags.disclaim_key_flags()  # --help counts the flag among those of the command that defines it
# Holds configs/, in a checkout by a link.
PACKAGE = Path(__file__).parents[1]


def _located(path: str) -> str:
    name = path.partition(":")[0]
    ships = not Path(name).exists() and (PACKAGE / name).is_file()
    return str(PACKAGE / path) if ships else path


def define_config(default: str | None, help_text: str) -> None:
    """Defines --config, and --config.key for each key of what the file's `get_config()` returns."""
    # A method has settings that no file lists; what no part of the program knows, `parse` refuses.
    config_flags.DEFINE_config_file(
        "config", None, help_text, lock_config=False, accept_new_attributes=True
    )
    parser = flags.FLAGS["config"].parser
    load = parser.parse
    parser.parse = lambda path: load(_located(path))
    flags.FLAGS.set_default("config", default)
