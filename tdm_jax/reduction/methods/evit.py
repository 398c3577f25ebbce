"""EViT: Not All Patches are What You Need (Liang et al., ICLR 2022, arXiv 2202.07800).

Top-K, and one more token made of what is dropped: `sum_i a_i x_i` over the inattentive tokens, with
`a` the class attention averaged over heads, not renormalised (as the authors' program has it; the
paper's equation 3 reads the same). The fused token is the last one, and counts in the next stage's
n.
"""

from tdm_jax.reduction.composed import Composed
from tdm_jax.reduction.decoupling import Decoupling

EVIT = Composed(title="EViT", decoupling=Decoupling(preset="importance", fuse=True), grouping=None)
