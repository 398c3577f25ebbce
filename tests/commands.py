"""Runs a command of the package in this process; its flags go with it."""

from types import ModuleType

from absl import flags


def run(module: ModuleType, *arguments: object) -> None:
    """As `python -m <module> <arguments>` does, but errors are raised."""
    before, was_parsed = set(flags.FLAGS), flags.FLAGS.is_parsed()
    module.define_flags()
    try:
        flags.FLAGS([module.__name__, *map(str, arguments)])
        module.main()
    finally:
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)
        if not was_parsed:
            flags.FLAGS.unparse_flags()
