"""Methods at one cost: each one's own setting, solved for the multiply-adds that an image may take.

That setting is a keep rate, the tokens that every block loses, a ratio, rows and columns, or
published counts (`Reducer.variants`); the cost is the exact one of the schedule it makes.
"""

import bisect

from tdm_jax.analysis import costs
from tdm_jax.errors import InputError
from tdm_jax.models.vit import VisionTransformer
from tdm_jax.reduction import Reducer


def check_budget(model: VisionTransformer, macs: int) -> None:
    """Raises InputError unless a budget is below what a model costs without reduction."""
    whole = costs.multiply_adds(model.clone(reducer=Reducer()))
    if macs >= whole:
        raise InputError(
            f"expected a budget below the {whole / 1e9:.4g} G without reduction; "
            f"got {macs / 1e9:.4g} G"
        )


def at_budget(model: VisionTransformer, reducer: Reducer, macs: int) -> Reducer:
    """The method at the highest cost that a budget allows.

    Args:
      model: whose costs count; its own reducer does not matter.
      reducer: the method.
      macs: multiply-adds that one image may take.

    Raises:
      InputError: the budget is no reduction, the method has nothing that decides its cost, or it
        costs more whatever that is.
    """
    check_budget(model, macs)
    shape = model.shape
    reducer.check(shape)
    variants = reducer.variants(shape)

    def cost(index: int) -> int | None:
        try:
            variants[index].check(shape)
            return costs.multiply_adds(model.clone(reducer=variants[index]))
        except InputError:  # more than the method can remove
            return None

    # Costs fall, up to where a method cannot leave so few tokens.
    first = bisect.bisect_left(range(len(variants)), True, key=lambda i: (cost(i) or 0) <= macs)
    for index in range(first, len(variants)):
        if (found := cost(index)) is not None and found <= macs:
            return variants[index]
    least = min((each for i in range(len(variants)) if (each := cost(i)) is not None), default=0)
    raise InputError(
        f"{reducer.title}: expected a budget of {least / 1e9:.4g} G multiply-adds or more; "
        f"got {macs / 1e9:.4g} G"
    )
