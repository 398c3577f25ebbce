"""Token reduction methods behind one contract."""

from tdm_jax.reduction.base import BlockPlan, Reducer, StageReducer, Step, ViTShape, plan
from tdm_jax.reduction.registry import REDUCERS, describe_reducer, make_reducer, names

__all__ = [
    "REDUCERS",
    "BlockPlan",
    "Reducer",
    "StageReducer",
    "Step",
    "ViTShape",
    "describe_reducer",
    "make_reducer",
    "names",
    "plan",
]
