"""Token reduction methods behind one contract."""

from tdm_jax.reduction.contract import (
    BlockContext,
    BlockPlan,
    Reducer,
    StageReducer,
    ViTShape,
    plan,
)
from tdm_jax.reduction.registry import REDUCERS, describe_reducer, make_reducer, names

__all__ = [
    "REDUCERS",
    "BlockContext",
    "BlockPlan",
    "Reducer",
    "StageReducer",
    "ViTShape",
    "describe_reducer",
    "make_reducer",
    "names",
    "plan",
]
