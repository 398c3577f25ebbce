"""The table of all methods, and how a name with settings becomes a reducer."""

import dataclasses
from typing import Any

from tdm_jax.errors import InputError, unknown
from tdm_jax.reduction.contract import Reducer
from tdm_jax.reduction.merger import Merger
from tdm_jax.reduction.methods.atc import ATC
from tdm_jax.reduction.methods.ats import ATS
from tdm_jax.reduction.methods.avit import AViT
from tdm_jax.reduction.methods.cubist import CubistMerge
from tdm_jax.reduction.methods.diffrate import DiffRate
from tdm_jax.reduction.methods.dpcknn import DPCKNN, ScoredDPCKNN
from tdm_jax.reduction.methods.dtem import DTEM
from tdm_jax.reduction.methods.dyvit import DynamicViT
from tdm_jax.reduction.methods.evit import EViT
from tdm_jax.reduction.methods.evovit import EvoViT
from tdm_jax.reduction.methods.iared2 import IARED2
from tdm_jax.reduction.methods.kmedoids import KMedoids
from tdm_jax.reduction.methods.mctf import MCTF
from tdm_jax.reduction.methods.patchmerger import PatchMerger
from tdm_jax.reduction.methods.pitome import PiToMe
from tdm_jax.reduction.methods.ppt import PPT
from tdm_jax.reduction.methods.psvit import PSViT
from tdm_jax.reduction.methods.random import Random
from tdm_jax.reduction.methods.sinkhorn import Sinkhorn
from tdm_jax.reduction.methods.sit import SiT
from tdm_jax.reduction.methods.spvit import SPViT
from tdm_jax.reduction.methods.svite import SViTE
from tdm_jax.reduction.methods.tocom import ToCom
from tdm_jax.reduction.methods.tofu import ToFu
from tdm_jax.reduction.methods.tome import ToMe
from tdm_jax.reduction.methods.topk import TopK
from tdm_jax.reduction.prune import PruneReducer
from tdm_jax.reduction.stages import StageReducer

REDUCERS: dict[str, type[Reducer]] = {
    "none": Reducer,
    "random": Random,
    "topk": TopK,
    "evit": EViT,
    "tome": ToMe,
    "diffrate": DiffRate,
    "cubist": CubistMerge,
    "pitome": PiToMe,
    "tofu": ToFu,
    "atc": ATC,
    "dtem": DTEM,
    "mctf": MCTF,
    "ppt": PPT,
    "dpcknn": DPCKNN,
    "dpcknn_score": ScoredDPCKNN,
    "kmedoids": KMedoids,
    "sinkhorn": Sinkhorn,
    "patchmerger": PatchMerger,
    "sit": SiT,
    "evovit": EvoViT,
    "ats": ATS,
    "avit": AViT,
    "psvit": PSViT,
    "dyvit": DynamicViT,
    "spvit": SPViT,
    "svite": SViTE,
    "iared2": IARED2,
    "tocom": ToCom,
}

# Where TDM's merger takes over the tokens that a method would drop.
_MERGED = "+tdm"


def list_reducers() -> list[str]:
    """Every name that `make_reducer` takes."""
    merged = (n + _MERGED for n, kind in REDUCERS.items() if issubclass(kind, PruneReducer))
    return [*REDUCERS, "tdm", *merged]


def setting_names(name: str) -> set[str]:
    """The settings that `make_reducer` takes with this name.

    Raises:
      InputError: the name is unknown.
    """
    if name not in list_reducers():
        raise unknown("reducer", name, list_reducers())
    return set().union(*(_settings(kind) for kind in _parts(name) if kind is not None))


def _parts(name: str) -> tuple[type[Reducer], type[Merger] | None]:
    merged = name == "tdm" or name.endswith(_MERGED)
    kind = REDUCERS["topk" if name == "tdm" else name.removesuffix(_MERGED)]
    return kind, Merger if merged else None


def make_reducer(name: str, **settings: Any) -> Reducer:
    """Builds a reducer by name.

    Args:
      name: a method of `REDUCERS`; "tdm"; or a method that drops tokens with "+tdm" behind it,
        which hands its scores to TDM's merger ("evit+tdm" is TDM with EViT's fused token).
      **settings: the method's own, e.g. `keep_rate`, `layers`; with TDM also those of its `Merger`.
        A list stands for a tuple, None for the default.

    Raises:
      InputError: the name or a setting is unknown, or a setting's value is out of range.
    """
    known = setting_names(name)
    for setting in settings:
        if setting not in known:
            raise unknown(f"setting of reducer {name!r}", setting, known or {"(none)"})
    kind, merger = _parts(name)
    own = _settings(kind)
    settings = {key: _tuples(value) for key, value in settings.items() if value is not None}
    arguments = {key: value for key, value in settings.items() if key in own}
    if merger is not None:
        of_merger = {key: value for key, value in settings.items() if key not in own}
        if name == "evit+tdm":
            of_merger.setdefault("fuse", True)
        arguments["merger"] = merger(**of_merger)
    try:
        reducer = kind(**arguments)
    except TypeError as error:
        raise InputError(f"reducer {name!r}: {error}; got {settings}") from error
    schedules = [key for key in ("keep_rate", "counts", "r", "ratio") if key in settings]
    # An adaptive method's counts are slots for what its keep rate lets through.
    if len(schedules) > 1 and not reducer.adaptive:
        raise InputError(
            f"reducer {name!r}: expected one of keep_rate, counts and r; got {', '.join(schedules)}"
        )
    return reducer


def describe_reducer(reducer: Reducer) -> dict[str, Any]:
    """What `make_reducer` takes to build the same reducer, as JSON can hold it.

    Returns:
      `name`, and the settings that differ from the method's defaults; calibrated counts are among
      them.

    Raises:
      InputError: the method is in no table.
    """
    of_kind = [name for name, kind in REDUCERS.items() if kind is type(reducer)]
    if not of_kind:
        raise InputError(
            f"{type(reducer).__name__} has no name; expected a method of the table: "
            f"{', '.join(REDUCERS)}"
        )
    name, settings = of_kind[0], _changed(reducer)
    if isinstance(reducer, StageReducer) and not (reducer.by_rate or reducer.adaptive):
        settings.pop("keep_rate", None)  # overruled
    merger = settings.pop("merger", None)
    if merger is not None:
        name = "tdm" if name == "topk" else name + _MERGED
        settings |= _changed(merger)
    return {"name": name, **{key: _plain(value) for key, value in settings.items()}}


def _changed(description: Any) -> dict[str, Any]:
    values = {f.name: (getattr(description, f.name), f) for f in dataclasses.fields(description)}
    return {name: value for name, (value, field) in values.items() if value != field.default}


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _settings(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)} - {"merger"}
