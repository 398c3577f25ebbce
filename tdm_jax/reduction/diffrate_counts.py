"""How many tokens each block keeps, as DiffRate found it for DeiT (arXiv 2305.17997).

Chen et al., "DiffRate: Differentiable Compression Rate for Efficient Vision Transformers", ICCV
2023: the lists that its search ended with, by network and budget in GMACs. All count the class
token beside the 196 patches of an image of 224 pixels, block by block: tokens that pruning leaves,
then tokens that merging leaves. A count above what reaches a block removes nothing.
"""

from typing import NamedTuple

from tdm_jax.errors import unknown

_PATCHES = 196


class KeptCounts(NamedTuple):
    """Tokens that stay in each block, the class token counted."""

    prune: tuple[int, ...]
    merge: tuple[int, ...]


# fmt: off
PUBLISHED = {
    "tiny_0.6": KeptCounts((197, 196, 180, 157, 130, 107, 86, 73, 63, 51, 40, 3),
                           (197, 187, 167, 139, 114, 90, 76, 66, 57, 45, 37, 3)),
    "tiny_0.7": KeptCounts((197, 196, 194, 180, 150, 123, 98, 82, 68, 60, 52, 3),
                           (197, 196, 192, 158, 133, 103, 88, 72, 64, 58, 49, 3)),
    "tiny_0.8": KeptCounts((197, 197, 196, 186, 166, 147, 117, 103, 92, 80, 74, 3),
                           (197, 196, 190, 172, 154, 125, 107, 96, 84, 78, 70, 3)),
    "tiny_0.9": KeptCounts((197, 197, 196, 190, 182, 166, 141, 125, 113, 105, 99, 3),
                           (197, 196, 194, 188, 172, 147, 129, 115, 107, 103, 96, 3)),
    "tiny_1.0": KeptCounts((197, 197, 196, 194, 188, 184, 178, 164, 156, 137, 129, 21),
                           (197, 197, 196, 190, 186, 154, 148, 156, 145, 135, 125, 21)),
    "small_2.3": KeptCounts((197, 192, 168, 143, 121, 105, 92, 74, 62, 45, 33, 3),
                            (197, 180, 156, 127, 109, 98, 80, 66, 52, 37, 31, 3)),
    "small_2.5": KeptCounts((197, 192, 174, 156, 131, 115, 111, 99, 76, 50, 39, 3),
                            (197, 186, 160, 133, 119, 107, 96, 82, 66, 43, 37, 3)),
    "small_2.7": KeptCounts((197, 196, 182, 160, 141, 127, 115, 105, 88, 66, 49, 3),
                            (197, 188, 170, 147, 131, 119, 109, 96, 76, 54, 45, 3)),
    "small_2.9": KeptCounts((197, 196, 190, 168, 150, 139, 129, 117, 99, 78, 58, 3),
                            (197, 194, 176, 156, 141, 133, 121, 107, 88, 64, 56, 3)),
    "small_3.1": KeptCounts((197, 197, 194, 180, 160, 147, 137, 129, 115, 92, 76, 3),
                            (197, 196, 186, 164, 150, 141, 133, 121, 103, 78, 68, 3)),
    "base_8.7": KeptCounts((197, 192, 172, 156, 131, 107, 90, 72, 56, 33, 17, 3),
                           (197, 178, 162, 141, 115, 96, 78, 60, 47, 21, 13, 3)),
    "base_10.0": KeptCounts((197, 194, 182, 168, 148, 129, 113, 101, 82, 49, 25, 3),
                            (197, 186, 174, 156, 137, 117, 105, 90, 66, 31, 19, 3)),
    "base_10.4": KeptCounts((197, 196, 188, 174, 156, 141, 121, 103, 90, 58, 25, 3),
                            (197, 190, 184, 164, 145, 131, 107, 94, 74, 31, 21, 3)),
    "base_11.5": KeptCounts((197, 197, 197, 188, 170, 154, 139, 123, 107, 72, 43, 3),
                            (197, 197, 192, 178, 158, 145, 127, 111, 94, 50, 35, 3)),
    "base_12.5": KeptCounts((197, 197, 196, 192, 184, 170, 154, 139, 129, 94, 58, 3),
                            (197, 196, 194, 190, 176, 160, 145, 131, 115, 68, 47, 3)),
}
# fmt: on


def published_counts(name: str, patches: int) -> KeptCounts:
    """A published schedule, carried to an image of another number of patches.

    Each count keeps its share of the patches: `max(2, round((k - 1) * patches / 196)) + 1`.

    Raises:
      InputError: there is none of this name.
    """
    if name not in PUBLISHED:
        raise unknown("published counts", name, PUBLISHED)
    prune, merge = (
        tuple(max(2, round((kept - 1) * patches / _PATCHES)) + 1 for kept in counts)
        for counts in PUBLISHED[name]
    )
    return KeptCounts(prune, merge)
