"""How every command starts and fails: flags by absl, bad input in one line, exit code 2."""

import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import app, flags, logging

from tdm_jax.errors import InputError


def fail(error: Exception | str) -> NoReturn:
    """Prints one line to standard error and exits with code 2."""
    line = " ".join(str(error).split())
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


def note(text: str) -> None:
    """Says on standard error what is being done."""
    print(text, file=sys.stderr, flush=True)


def _parse(argv: Sequence[str]) -> list[str]:
    # absl's own parser prints a page of usage and exits with 1. A config file that raises, or that
    # has no such key, surfaces here too: config_flags loads it while parsing.
    try:
        rest = flags.FLAGS(list(argv))
    except (flags.Error, InputError, AttributeError, KeyError, TypeError, OSError) as error:
        fail(error)
    # absl.app would raise it to INFO, where Orbax and grain report every step they take.
    if flags.FLAGS["verbosity"].using_default_value:
        logging.set_verbosity(logging.WARNING)
    if len(rest) > 1:
        fail(f"unexpected arguments {rest[1:]}; every setting is a --flag (try --help)")
    return rest


def run(main: Callable[[], None]) -> None:
    """Runs a command's `main()` after its flags are parsed.

    `InputError` becomes one line on standard error and exit code 2; anything else is a defect of
    ours and keeps its traceback.
    """

    def checked(argv: list[str]) -> None:
        del argv
        try:
            main()
        except InputError as error:
            fail(error)

    app.run(checked, flags_parser=_parse)
