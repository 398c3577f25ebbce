"""The flag --config: a file below the working folder or, where it has none, one that ships."""

from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

# Holds configs/, in a checkout by a link.
PACKAGE = Path(__file__).parents[1]


class _Parser(config_flags.ConfigFileFlagParser):
    def parse(self, path: str) -> ConfigDict:
        name = path.partition(":")[0]
        ships = not Path(name).exists() and (PACKAGE / name).is_file()
        return super().parse(str(PACKAGE / path) if ships else path)


def define_config(default: str | None, help_text: str) -> None:
    """Defines --config, and --config.key for each key of the file's `get_config()`."""
    config_flags.DEFINE_config_file("config", None, help_text)
    flags.FLAGS["config"].parser = _Parser("config")
    flags.FLAGS.set_default("config", default)
