"""Token reduction methods behind one contract."""

from tdm_jax.reduction.contract import BlockContext, BlockPlan, Reducer, ViTShape, plan
from tdm_jax.reduction.registry import REDUCERS, describe_reducer, list_reducers, make_reducer
from tdm_jax.reduction.stages import StageReducer

__all__ = [
    "REDUCERS",
    "BlockContext",
    "BlockPlan",
    "Reducer",
    "StageReducer",
    "ViTShape",
    "describe_reducer",
    "list_reducers",
    "make_reducer",
    "plan",
]
