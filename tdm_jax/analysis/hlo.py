"""What the text of a compiled program says: what devices send each other, and at what cost."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

_TYPE_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_DEFINED = re.compile(r"(?P<name>%[\w.-]+) = (?P<shapes>.*?) [a-z][\w-]*\(")
# Of an asynchronous one, its end: the start holds operands as well.
_COLLECTIVE = re.compile(
    r"= (?P<shapes>.*?) "
    r"(?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-done)?"
    r"\((?P<operands>[^)]*)\)"
)
_CHANNEL = re.compile(r"channel_id=(\d+)")
# {{0,1},{2,3}} lists the groups; [2,4]<=[8] says that there are two of four; the third names the
# axes of a mesh, mesh['axis_0'=2,'axis_1'=4] {'axis_1'}.
_GROUPS = re.compile(
    r"replica_groups=(?:\{\{(?P<first>[\d,]*)\}|\[\d+,(?P<size>\d+)\]<="
    r"|mesh\[(?P<mesh>[^\]]*)\].*? \{(?P<axes>'[^}]*)\})"
)
_SHAPE = re.compile(r"(?P<type>[a-z]+\d*)\[(?P<dims>[\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|condition|body|branch_computations|called_computations)="
    r"(?:\{(?P<several>[^}]*)\}|(?P<one>%[\w.-]+))"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_UNPRICED = re.compile(r' (?:sort|gather|scatter)\(|custom_call_target="tpu_custom_call"')
_IN_BLOCK = re.compile(r'op_name="[^"]*/blocks_\d+/(?P<module>\w+)')
REST = "rest"
_PARTS = dict.fromkeys(("attn", "norm1", "ls1"), "attention")
_PARTS |= dict.fromkeys(("mlp", "norm2", "ls2"), "mlp")
# What a device of a group of n sends for each byte of the whole array, round a ring.
_SENT = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}


class Moved(NamedTuple):
    """Collectives of one kind.

    Attributes:
      operations: how many.
      bytes: of the whole arrays: of what an all-gather gives and a reduce-scatter takes.
      sent: bytes that each device sends for them, each group being a ring.
    """

    operations: int
    bytes: int
    sent: float


class _Line(NamedTuple):
    computation: str
    runs: int
    text: str


def collectives(text: str, devices: int) -> dict[str, Moved]:
    """The collectives of a compiled program by kind; those in a loop as often as they run.

    Args:
      text: the program's.
      devices: that it runs on.
    """
    defined = {match["name"]: match["shapes"] for match in _DEFINED.finditer(text)}
    by_name = {
        match["name"]: line for line in text.splitlines() if (match := _DEFINED.search(line))
    }
    # TPU's compiler spreads one collective over several fusions, all on the same channel.
    each: dict[tuple[str, str], Moved] = {}
    for number, line in enumerate(_lines(text)):
        match = _COLLECTIVE.search(line.text)
        if match is None:
            continue
        kind, shapes = match["kind"], match["shapes"]
        operands = re.findall(r"%[\w.-]+", match["operands"])
        # The end of an asynchronous one leaves these to its start.
        said = line.text if "-done(" not in line.text else by_name.get(operands[0], "")
        if kind == "reduce-scatter":
            shapes = " ".join(defined[name] for name in operands)
        channel, size = _CHANNEL.search(said), _bytes(shapes)
        key = channel[1] if channel else f"line {number}"
        if line.computation.startswith("%all-reduce-scatter"):
            # As TPU's compiler writes a reduce-scatter; several may say the same channel.
            kind, key = "reduce-scatter", line.computation
        sent = size * _SENT[kind](_group(said, devices))
        each[kind, key] = Moved(line.runs, line.runs * size, line.runs * sent)
    kinds = dict.fromkeys(kind for kind, _ in each)
    return {
        kind: Moved(*map(sum, zip(*(v for (k, _), v in each.items() if k == kind), strict=True)))
        for kind in kinds
    }


def cycles(text: str) -> dict[str, int]:
    """What TPU's compiler estimates for a program, by part of the model; {} from other compilers.

    A part is "attention" or "mlp", each with its norm, "stage", what else a block does, or `REST`.
    A fusion counts for the part of its last operation. For what is missing see `unpriced`.
    """
    parts: Counter[str] = Counter()
    for line in _lines(text):
        match = _CYCLES.search(line.text)
        if match:
            parts[_part(line.text)] += line.runs * int(match[1])
    return dict(parts)


def unpriced(text: str) -> int:
    """How many gathers, scatters, sorts and kernels run, which have no estimate of cycles."""
    return sum(line.runs for line in _lines(text) if _UNPRICED.search(line.text))


def _lines(text: str) -> Iterator[_Line]:
    """Every line with the computation that it is in, and how often that runs."""
    lines, computation = [], ""
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")):
            computation = line
        lines.append((computation, line))
    runs: Counter[str] = Counter()
    callers: dict[str, list[tuple[str, int]]] = {}
    for owner, line in lines:
        trips = _TRIPS.search(line)
        for match in _CALLED.finditer(line):
            for name in re.findall(r"%[\w.-]+", match[0]):
                callers.setdefault(name, []).append((_name(owner), int(trips[1]) if trips else 1))

    def count(name: str) -> int:
        if name not in runs:
            called = callers.get(name, [])
            runs[name] = sum(count(owner) * trips for owner, trips in called) if called else 1
        return runs[name]

    for owner, line in lines:
        yield _Line(owner, count(_name(owner)), line)


def _name(computation: str) -> str:
    return re.split(r"[ (]", computation.removeprefix("ENTRY ").strip(), maxsplit=1)[0]


def _part(line: str) -> str:
    match = _IN_BLOCK.search(line)
    return _PARTS.get(match["module"], "stage") if match else REST


def _group(line: str, devices: int) -> int:
    """Devices that take part together."""
    match = _GROUPS.search(line)
    if match is None:
        return devices
    if match["mesh"]:
        sizes = dict(axis.split("=") for axis in match["mesh"].split(","))
        return math.prod(int(sizes[axis]) for axis in match["axes"].split(","))
    return int(match["size"] or 0) or match["first"].count(",") + 1


def _bytes(shapes: str) -> int:
    return sum(
        _TYPE_BYTES.get(shape["type"], 4) * math.prod(int(n) for n in shape["dims"].split(",") if n)
        for shape in _SHAPE.finditer(shapes)
    )
