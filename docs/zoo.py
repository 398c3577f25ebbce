"""The tables of docs/zoo.md, from the code and its tests: `python -m docs.zoo` prints them."""

import importlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tdm_jax import list_models
from tdm_jax.reduction.registry import REDUCERS

GOLDENS = Path(__file__).parents[1] / "tests/goldens"

# What names of models, and of networks in tests/goldens, have in common; the first that fits.
FAMILIES = {
    "DeiT III": r"deit3",
    "DeiT": r"deit",
    "DINOv2": r"dinov2",
    "DINOv3": r"dinov3",
    "EVA-02": r"eva02",
    "SigLIP, SigLIP 2, PaliGemma": r"siglip",
    "CLIP, OpenCLIP, TinyCLIP": r"clip",
    "ViT: AugReg, DINO, MAE": r"vit|mae|augreg",
}


class Compared(NamedTuple):
    """What a method is equal to, and how its golden files begin."""

    original: str
    goldens: tuple[str, ...] = ()


_AUTHORS = "the authors' program"
_BENCHMARK = "the token reduction benchmark's program (2308.04657)"
_SLOW = "a slow reference, written from the definition"
METHODS = {
    "none": Compared("timm's and facebook's plain network", ("none", "distilled")),
    "random": Compared("nothing: a draw for each image and key"),
    "topk": Compared("EViT's program without its fused token", ("topk_",)),
    "evit": Compared(_AUTHORS, ("evit_",)),
    "tdm": Compared(
        "a slow float64 program, for the authors published logs, but no code; and the "
        "multiply-adds in their logs to the last digit, at all six keep rates",
        ("tdm_",),
    ),
    "tome": Compared(_AUTHORS, ("tome_",)),
    "tocom": Compared(_AUTHORS, ("tocom_",)),
    "diffrate": Compared(f"{_AUTHORS}; the counts that they published", ("diffrate_",)),
    "cubist": Compared(_AUTHORS, ("cubist_",)),
    "pitome": Compared(_AUTHORS, ("pitome_",)),
    "tofu": Compared("OpenToMe's program", ("tofu_",)),
    "atc": Compared(f"{_AUTHORS}, in stages and off the shelf", ("atc_", "atcssl_")),
    "dtem": Compared(f"{_AUTHORS}, in a step of training, too", ("dtem_", "dtemtrain_")),
    "mctf": Compared(f"{_AUTHORS}, in every setting", ("mctf_",)),
    "ppt": Compared(f"{_AUTHORS}, where it prunes and where it pools", ("ppt_",)),
    "dpcknn": Compared(_BENCHMARK, ("dpcknn_",)),
    "dpcknn_score": Compared(_SLOW),
    "kmedoids": Compared(_BENCHMARK, ("kmedoids_",)),
    "sinkhorn": Compared(_BENCHMARK, ("sinkhorn_",)),
    "patchmerger": Compared(_BENCHMARK, ("patchmerger_",)),
    "sit": Compared(_BENCHMARK, ("sit_",)),
    "dyvit": Compared(f"{_AUTHORS}, at inference", ("dyvit_",)),
    "spvit": Compared(f"{_SLOW}: the original draws at random"),
    "svite": Compared(f"{_SLOW}: the original draws at random"),
    "iared2": Compared(f"{_SLOW}: the authors released no program"),
    "evovit": Compared(f"{_AUTHORS} for DeiT", ("evovit_",)),
    "ats": Compared("the original program, image by image", ("ats_",)),
    "avit": Compared(f"{_AUTHORS}, with what a token's life costs", ("avit_",)),
    "psvit": Compared("the network with the same patches hidden by masks"),
}


def family(name: str) -> str:
    """What a model, or a network in tests/goldens, is one of."""
    return next(family for family, part in FAMILIES.items() if re.search(part, name))


def backbones() -> str:
    """The families, and the programs that each was compared with: a Markdown table."""
    networks = [
        path for path in GOLDENS.rglob("*_*") if re.match(r"(timm|hf|facebook|npz)_", path.name)
    ]
    rows = [("family", "names", "with tags", "small networks that answer as the original")]
    for name in FAMILIES:
        names = [model for model in list_models() if model != "vit" and family(model) == name]
        tags = [model for model in list_models("*.*") if family(model) == name]
        own = sorted(f"`{path.stem}`" for path in networks if family(path.name) == name)
        rows.append((name, str(len(names)), str(len(tags)), " ".join(own)))
    return _table(rows)


def methods() -> str:
    """The methods, and what each was compared with: a Markdown table."""
    rows = [("method", "paper", "equal to", "golden files")]
    for name in REDUCERS:
        compared = METHODS[name]
        files = [path for start in compared.goldens for path in GOLDENS.glob(f"{start}*.npz")]
        rows.append((f"`{name}`", paper(name), compared.original, str(len(files) or "–")))
    return _table(rows)


def paper(name: str) -> str:
    """The arXiv number in the docstring of a method's module, as a link."""
    if name == "none":
        return "–"
    module = importlib.import_module(f"tdm_jax.reduction.methods.{name.removesuffix('_score')}")
    found = re.search(r"arXiv\s+(\d{4}\.\d{5})", module.__doc__ or "")
    return f"[{found[1]}](https://arxiv.org/abs/{found[1]})" if found else "–"


def _table(rows: Iterable[tuple[str, ...]]) -> str:
    head, *rest = rows
    numbers = [cell.isdigit() for cell in rest[-1]]
    line = tuple("---:" if number else "---" for number in numbers)
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, line, *rest])


if __name__ == "__main__":
    print(backbones(), methods(), sep="\n")
