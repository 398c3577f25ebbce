"""Writes the files of this folder; needs torch (the tests do not). See README.md."""

import argparse
import os
import pickle
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
generator = torch.Generator().manual_seed(0)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


class Touch:
    """Runs a command when an ordinary unpickler loads it."""

    def __reduce__(self):
        return os.system, ("touch the_pickle_ran_me",)


expected: dict[str, torch.Tensor] = {}


def save(name: str, content: dict, *, expect: dict[str, torch.Tensor], **options) -> None:
    torch.save(content, HERE / name, **options)
    expected.update({f"{name}:{key}": value for key, value in expect.items()})


weights = {"a": randn(3, 4), "b": randn(5), "scalar": randn(), "empty": torch.zeros(0, 4)}
save("zip.pth", weights, expect=weights)
save("legacy.pth", weights, expect=weights, _use_new_zipfile_serialization=False)

kinds = ["float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
types = {kind: torch.arange(6).reshape(2, 3).to(getattr(torch, kind)) for kind in kinds}
types["bfloat16"] = randn(2, 3).bfloat16()
types["float16"] = randn(2, 3).half()
save("types.pth", types, expect=types)
save("types_legacy.pth", types, expect=types, _use_new_zipfile_serialization=False)

base = randn(6, 8)
views = {
    "base": base,
    "transposed": base.T,
    "rows": base[2:5:2],
    "columns": base[:, 1::3],
    "expanded": base[:1, :2].expand(4, 2),
    "element": base[3, 3],
}
save("views.pth", views, expect=views)
save("views_legacy.pth", views, expect=views, _use_new_zipfile_serialization=False)

# A small model trained for a step: parameters, optimizer state, averaged weights, arguments.
model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
model(randn(2, 4)).square().sum().backward()
optimizer.step()
ema = {key: value * 0.5 for key, value in model.state_dict().items()}
training = {
    "model": model.state_dict(),
    "model_ema": ema,
    "optimizer": optimizer.state_dict(),
    "lr_scheduler": {"last_epoch": 3, "base_lrs": [1e-3], "verbose": False},
    "epoch": 3,
    "scaler": {"scale": 65536.0, "growth_factor": 2.0, "growth_interval": 2000},
    "args": argparse.Namespace(lr=1e-3, model="deit_tiny_patch16_224", size=torch.Size([2, 3])),
    "size": torch.Size([2, 3]),
}
flat = {f"model.{k}": v for k, v in model.state_dict().items()}
flat |= {f"model_ema.{k}": v for k, v in ema.items()}
save("training.pth", training, expect=flat)
save("training_legacy.pth", training, expect=flat, _use_new_zipfile_serialization=False)

parameters = {"a": torch.nn.Parameter(randn(2, 3)), "b": torch.nn.Parameter(randn(2))}
save("parameters.pth", parameters, expect=parameters)


# Refused: each names a global that no file of weights needs.
torch.save({"model": weights, "extra": Touch()}, HERE / "malicious.pth")
torch.save(
    {"model": weights, "extra": Touch()},
    HERE / "malicious_legacy.pth",
    _use_new_zipfile_serialization=False,
)
torch.save({"model": weights, "accuracy": np.float64(81.8)}, HERE / "numpy_scalar.pth")
torch.save(torch.nn.Linear(2, 2), HERE / "whole_module.pth")
(HERE / "plain_pickle.pth").write_bytes(pickle.dumps({"a": [1.0]}, protocol=2))

arrays = {
    key: value.detach().float().numpy() if value.dtype == torch.bfloat16 else value.detach().numpy()
    for key, value in expected.items()
}
np.savez_compressed(HERE / "expected.npz", **arrays)

# What torch itself makes of every readable file, with its own restricted unpickler.
torch.serialization.add_safe_globals([argparse.Namespace])
for name in sorted({key.split(":")[0] for key in expected}):
    torch.load(HERE / name, weights_only=True)
for name in ("malicious", "malicious_legacy", "numpy_scalar", "whole_module", "plain_pickle"):
    try:
        torch.load(HERE / f"{name}.pth", weights_only=True)
    except Exception as error:
        print(f"torch refuses {name}: {str(error).splitlines()[0][:100]}")
    else:
        raise AssertionError(f"torch reads {name}.pth, and so should we")

# Position embeddings on another grid, as timm resizes them.
resized = {}
for old, new in [((8, 8), (12, 12)), ((8, 8), (5, 5)), ((4, 6), (8, 3))]:
    grid = randn(1, 3, *old)
    bigger = torch.nn.functional.interpolate(grid, size=new, mode="bicubic", antialias=True)
    for name, value in (("old", grid), ("new", bigger)):
        flat = value.flatten(2).transpose(1, 2)
        resized["_".join(map(str, (*old, *new, name)))] = flat.numpy()
np.savez_compressed(HERE / "resized.npz", **resized)
