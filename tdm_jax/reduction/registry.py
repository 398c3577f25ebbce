"""The table of all methods, and how a name with settings becomes a reducer."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from tdm_jax.errors import InputError, unknown
from tdm_jax.reduction.axes import AXES, table
from tdm_jax.reduction.composed import Composed
from tdm_jax.reduction.contract import Reducer
from tdm_jax.reduction.decoupling import Decoupling
from tdm_jax.reduction.methods.atc import ATC
from tdm_jax.reduction.methods.ats import ATS, ATS_TDM
from tdm_jax.reduction.methods.avit import AViT
from tdm_jax.reduction.methods.cubist import CubistMerge
from tdm_jax.reduction.methods.diffrate import DiffRate
from tdm_jax.reduction.methods.dpcknn import DPCKNN, SCORED_DPCKNN
from tdm_jax.reduction.methods.dtem import DTEM
from tdm_jax.reduction.methods.dyvit import DYNAMICVIT
from tdm_jax.reduction.methods.evit import EVIT
from tdm_jax.reduction.methods.evovit import EVOVIT_TDM, EvoViT
from tdm_jax.reduction.methods.iared2 import IARED2
from tdm_jax.reduction.methods.kmedoids import KMEDOIDS
from tdm_jax.reduction.methods.mctf import MCTF
from tdm_jax.reduction.methods.patchmerger import PATCHMERGER
from tdm_jax.reduction.methods.pitome import PITOME
from tdm_jax.reduction.methods.ppt import PPT
from tdm_jax.reduction.methods.psvit import PSViT
from tdm_jax.reduction.methods.random import RANDOM
from tdm_jax.reduction.methods.sinkhorn import SINKHORN
from tdm_jax.reduction.methods.sit import SIT
from tdm_jax.reduction.methods.spvit import SPVIT_TDM, SPViT
from tdm_jax.reduction.methods.svite import SVITE
from tdm_jax.reduction.methods.tdm import FROZEN, TDM
from tdm_jax.reduction.methods.tocom import ToCom
from tdm_jax.reduction.methods.tofu import TOFU
from tdm_jax.reduction.methods.tome import TOME
from tdm_jax.reduction.methods.topk import TOPK
from tdm_jax.reduction.parts import Part
from tdm_jax.reduction.schedules import Schedule
from tdm_jax.reduction.stages import StageReducer

#: Each name's point, with its default settings.
#:
#: :meta hide-value:
REDUCERS: dict[str, Reducer] = {
    "none": Reducer(),
    "tdm": TDM,
    "random": RANDOM,
    "topk": TOPK,
    "evit": EVIT,
    "tome": TOME,
    "diffrate": DiffRate(),
    "cubist": CubistMerge(),
    "pitome": PITOME,
    "tofu": TOFU,
    "atc": ATC,
    "dtem": DTEM,
    "mctf": MCTF(),
    "ppt": PPT(),
    "dpcknn": DPCKNN,
    "dpcknn_score": SCORED_DPCKNN,
    "kmedoids": KMEDOIDS,
    "sinkhorn": SINKHORN,
    "patchmerger": PATCHMERGER,
    "sit": SIT,
    "evovit": EvoViT(),
    "ats": ATS(),
    "avit": AViT(),
    "psvit": PSViT(),
    "dyvit": DYNAMICVIT,
    "spvit": SPViT(),
    "svite": SVITE,
    "iared2": IARED2,
    "tocom": ToCom(),
}


def _points() -> dict[str, Reducer]:
    """Each name with its point: the methods, and TDM in the place of what those do that drop."""
    dropping = {
        f"{name}+tdm": _with_tdm(point)
        for name, point in REDUCERS.items()
        if isinstance(point, Composed) and point.decoupling.drops
    }
    return REDUCERS | dropping | _MERGED


def _with_tdm(point: Composed) -> Composed:
    return dataclasses.replace(
        point,
        title=f"{point.title} with TDM",
        decoupling=Decoupling(fuse=point.decoupling.fuse),
        grouping=TDM.grouping,
        average=TDM.average,
    )


# The same of methods that are no points themselves, and TDM itself.
_MERGED: dict[str, Reducer] = {
    "topk+tdm": TDM,
    "spvit+tdm": SPVIT_TDM,
    "evovit+tdm": EVOVIT_TDM,
    "ats+tdm": ATS_TDM,
}
# Fields that say what a method is, not how it is set.
_STRUCTURE = ("title", "merger")
# Names of settings that older descriptions have.
_RENAMED = {"weight": "average"}


def list_reducers() -> list[str]:
    """Every name that `make_reducer` takes."""
    return list(_points())


def axes_table() -> str:
    """The methods that are made of parts, by axis: a Markdown table (docs/methods.md has it)."""
    return table({"tdm": TDM, "tdm/preset=frozen": FROZEN, **REDUCERS})


def setting_names(name: str, given: Mapping[str, Any] | None = None) -> set[str]:
    """The settings that `make_reducer` takes with this name.

    Args:
      name: of a method.
      given: settings of which some may name other parts, which bring their own; or may have older
        names.

    Raises:
      InputError: the name, or that of a part, is unknown.
    """
    given = given or {}
    names = {setting for _, _, setting in _settings(*_moved(name, given))}
    return names | {old for old, new in _RENAMED.items() if old in given and new in names}


def settings_of(reducer: Reducer) -> set[str]:
    """The settings that a reducer has, its parts' among them."""
    return {setting for _, _, setting in _settings(reducer)}


def _settings(
    value: Any, parts: Mapping[str, Part] | None = None, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any, str]]:
    """Where each setting is: the fields that lead to its owner, the owner, and its name.

    Args:
      value: a reducer or a part.
      parts: what stands on some of its axes instead.
      path: the fields that lead to it.
    """
    for field in dataclasses.fields(value):
        child = (parts or {}).get(field.name, getattr(value, field.name))
        is_axis = field.name in AXES and isinstance(value, Composed)
        if is_axis and "merger" not in path:
            yield path, value, field.name
        if isinstance(child, Part | Schedule | Composed):
            # A method that has another one inside has the schedule and the scores itself.
            if not ("merger" in path and field.name in ("schedule", "importance")):
                yield from _settings(child, path=(*path, field.name))
        elif not (is_axis or field.metadata.get("fixed") or field.name in _STRUCTURE) and not (
            "merger" in path and field.name == "place"
        ):
            yield path, value, field.name


def make_reducer(name: str, **settings: Any) -> Reducer:
    """Builds a reducer by name.

    Args:
      name: a method of `REDUCERS`; or a method that drops tokens with "+tdm" behind it, which hands
        its scores to TDM's decoupling and merging ("evit+tdm" is TDM with EViT's fused token).
      **settings: the method's own and its parts', e.g. `keep_rate`, `layers`, `neighbors`. What is
        made of parts is moved along an axis by the name of another part (`importance`, `grouping`,
        `metric`, `average`; see `tdm_jax.reduction.axes`) or by a part itself. A list stands for a
        tuple, None for the default.

    Raises:
      InputError: the name or a setting is unknown, or a setting's value is out of range.
    """
    settings = {key: _tuples(value) for key, value in settings.items() if value is not None}
    own = settings_of(_moved(name, {})[0])
    for old, new in _RENAMED.items():
        if old in settings and old not in own and new in own:
            settings[new] = settings.pop(old)
    known, (point, parts) = setting_names(name, settings), _moved(name, settings)
    for setting in settings:
        if setting not in known:
            raise unknown(f"setting of reducer {name!r}", setting, known or {"(none)"})
    schedules = [key for key in ("keep_rate", "counts", "r", "ratio") if key in settings]
    # An adaptive method's counts are slots for what its keep rate lets through.
    if len(schedules) > 1 and not point.adaptive:
        raise InputError(
            f"reducer {name!r}: expected one of keep_rate, counts, r and ratio; "
            f"got {', '.join(schedules)}"
        )
    try:
        return _replaced(point, settings, parts)
    except TypeError as error:
        raise InputError(f"reducer {name!r}: {error}; got {settings}") from error


def _moved(name: str, settings: Mapping[str, Any]) -> tuple[Reducer, dict[str, Part]]:
    """The point of a name, and what settings put on its axes instead."""
    points = _points()
    if name not in points:
        raise unknown("reducer", name, points)
    frozen = name in ("tdm", "topk+tdm") and settings.get("preset") == "frozen"
    point = FROZEN if frozen else points[name]
    axes = settings_of(point) & AXES.keys()
    given = {axis: settings[axis] for axis in AXES if settings.get(axis) is not None}
    return point, {axis: _part(name, axis, given[axis]) for axis in given if axis in axes}


def _part(name: str, axis: str, value: Any) -> Any:
    if isinstance(value, Part):
        return value
    if value not in AXES[axis]:
        raise unknown(f"{axis} of reducer {name!r}", value, AXES[axis])
    return AXES[axis][value]


def _replaced(value: Any, settings: dict[str, Any], parts: Mapping[str, Part]) -> Any:
    """The same with other parts and settings; all at once, so that they fit."""
    by_path: dict[tuple[str, ...], dict[str, Any]] = {}
    for path, _, setting in _settings(value, parts):
        if setting in settings and setting not in parts:
            by_path.setdefault(path, {})[setting] = settings[setting]
    return _rebuilt(value, by_path, parts)


def _rebuilt(
    value: Any,
    by_path: dict[tuple[str, ...], dict[str, Any]],
    parts: Mapping[str, Part] | None = None,
) -> Any:
    changes, parts = dict(by_path.get((), {})), parts or {}
    for child in {path[0] for path in by_path if path} | parts.keys():
        inner = {path[1:]: own for path, own in by_path.items() if path[:1] == (child,)}
        changes[child] = _rebuilt(parts.get(child, getattr(value, child)), inner)
    return dataclasses.replace(value, **changes) if changes else value


def describe_reducer(reducer: Reducer) -> dict[str, Any]:
    """What `make_reducer` takes to build the same reducer, as JSON can hold it.

    Returns:
      `name`, and the settings that differ from the method's defaults; calibrated counts are among
      them.

    Raises:
      InputError: the method is in no table.
    """
    points = _points()
    named = [
        name
        for name, point in points.items()
        if type(point) is type(reducer) and point.title == reducer.title
    ]
    if not named:
        raise InputError(
            f"{reducer.title} has no name; expected a method of the table: {', '.join(points)}"
        )
    base, settings = points[named[0]], {}
    if isinstance(reducer, Composed) and reducer.decoupling.preset == "frozen":
        base, settings = FROZEN, {"preset": "frozen"}
    for axis, parts in AXES.items() if isinstance(reducer, Composed) else ():
        part = getattr(reducer, axis)
        if type(part) is not type(getattr(base, axis)):
            names = [name for name, other in parts.items() if type(other) is type(part)]
            if not names:
                raise InputError(f"{reducer.title}: its {axis} has no name; got {part}")
            settings[axis] = names[0]
            base = dataclasses.replace(base, **{axis: parts[names[0]]})
    before = {(*path, name): getattr(owner, name) for path, owner, name in _settings(base)}
    for path, owner, name in _settings(reducer):
        value = getattr(owner, name)
        if name not in AXES and value != before[(*path, name)]:
            settings[name] = _plain(value)
    if isinstance(reducer, StageReducer) and not (reducer.by_rate or reducer.adaptive):
        settings.pop("keep_rate", None)  # overruled
    return {"name": named[0], **settings}


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
