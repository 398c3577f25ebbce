"""The API reference: a page for each room, module and command, made of the package as it is."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

from absl import flags

import tdm_jax

FOUND = [
    module
    for module in pkgutil.walk_packages(tdm_jax.__path__, "tdm_jax.")
    if not module.name.startswith("tdm_jax.configs")
]
ROOMS = [module.name for module in FOUND if module.ispkg]
# What `python -m` calls.
COMMAND = ("define_flags", "main")


def is_command(module: ModuleType) -> bool:
    """Whether `python -m` runs it."""
    return all(hasattr(module, name) for name in COMMAND)


def public_names() -> Iterator[tuple[str, Any]]:
    """What must have a docstring and be in the reference: its full name, and it.

    These are the modules, their functions and classes without an underscore, and the methods and
    properties that those define.
    """
    for name in ["tdm_jax", *(module.name for module in FOUND)]:
        module = importlib.import_module(name)
        yield name, module
        left_out = COMMAND if is_command(module) else ()
        for key, value in vars(module).items():
            own = getattr(value, "__module__", None) == name and key not in left_out
            if own and key[0] != "_" and (inspect.isclass(value) or inspect.isfunction(value)):
                yield f"{name}.{key}", value
                yield from _members(f"{name}.{key}", value)


def _members(name: str, owner: Any) -> Iterator[tuple[str, Any]]:
    for key, value in vars(owner).items() if inspect.isclass(owner) else ():
        function = getattr(value, "fget", None) or getattr(value, "__func__", value)
        own = getattr(function, "__module__", None) == owner.__module__
        if own and key[0] != "_" and getattr(function, "__name__", None) == key:
            yield f"{name}.{key}", getattr(owner, key)


def pages() -> dict[str, str]:
    """The text of every page in reStructuredText, by its name."""
    every = [importlib.import_module(module.name) for module in FOUND]
    commands = [module for module in every if is_command(module)]
    made = {module.__name__: _module(module) for module in every}
    made |= {room: _room(importlib.import_module(room)) for room in ROOMS}
    return made | {
        "index": _title("API reference") + _front_door() + _listed("Rooms", _inside("tdm_jax")),
        "commands": _title("Commands")
        + "``python -m`` runs each; its ``--help`` says what its page does.\n\n"
        + _listed("All", commands),
    }


def _inside(room: str) -> list[ModuleType]:
    """What lies in a room, but for commands of the root, which have a list of their own."""
    names = [module.name for module in FOUND if module.name.rpartition(".")[0] == room]
    inside = [importlib.import_module(name) for name in names]
    return [module for module in inside if room != "tdm_jax" or not is_command(module)]


def _title(text: str) -> str:
    return f"{text}\n{'=' * len(text)}\n\n"


def _section(text: str) -> str:
    return f"{text}\n{'-' * len(text)}\n\n"


def _front_door() -> str:
    """What `import tdm_jax` gives."""
    parts = [".. automodule:: tdm_jax\n   :no-members:\n\n"]
    for name in tdm_jax.__all__:
        value = getattr(tdm_jax, name)
        if inspect.ismodule(value):
            parts.append(f".. py:data:: tdm_jax.{name}\n\n   The module `{value.__name__}`.\n\n")
        elif inspect.isclass(value):
            parts.append(f".. autoclass:: tdm_jax.{name}\n\n")
        elif callable(value):
            parts.append(f".. autofunction:: tdm_jax.{name}\n\n")
    return "".join(parts)


def _room(room: ModuleType) -> str:
    name, exported = room.__name__, ""
    if names := getattr(room, "__all__", ()):
        owners = {key: getattr(getattr(room, key), "__module__", None) for key in names}
        links = [f"`~{owner}.{key}`" if owner else f"`{key}`" for key, owner in owners.items()]
        exported = f"To be imported from here, too: {', '.join(links)}.\n\n"
    listed = _listed("Modules", _inside(name))
    return f"{_title(name)}.. automodule:: {name}\n   :no-members:\n\n{exported}{listed}"


def _listed(heading: str, found: Iterable[ModuleType]) -> str:
    names = {module.__name__: inspect.getdoc(module) or "" for module in found}
    said = [f":doc:`{name}`\n   {text.splitlines()[0]}\n\n" for name, text in names.items()]
    toctree = [f"   {name.rpartition('.')[2]} <{name}>\n" for name in names]
    return f"{_section(heading)}{''.join(said)}.. toctree::\n   :hidden:\n\n{''.join(toctree)}\n"


def _module(module: ModuleType) -> str:
    name = module.__name__
    text = _title(name) + f".. automodule:: {name}\n"
    if not is_command(module):
        return text
    described = "".join(map(_flag, _flags(module)))
    return f"{text}   :exclude-members: {', '.join(COMMAND)}\n\n{_section('Flags')}{described}"


def _flags(command: Any) -> list[flags.Flag]:
    before = set(flags.FLAGS)
    try:
        command.define_flags()
        found = [flags.FLAGS[name] for name in sorted(set(flags.FLAGS) - before)]
    finally:
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)
    return [flag for flag in found if flag.help and not flag.help.startswith("Alias for")]


def _flag(flag: flags.Flag) -> str:
    words = " ".join(flag.help.split()).split("; repeat this option")[0]
    default = (flag.default_as_str or "").strip("'")
    value = f"={default}" if default not in ("", "None", "[]") else ""
    return f"``--{flag.name}{value}``\n   {words}\n\n"
