"""The collectives of a compiled program, read from its HLO text: what is sent, and how often.

Bytes are those that one device sends if the collective runs as a ring of g devices over S bytes:
all-reduce 2 (g - 1)/g S, all-gather, reduce-scatter and all-to-all (g - 1)/g S, collective-permute
S.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

# Bytes: {"fsdp": {"all-gather": …}}; axes that share a group are joined, as in "data+fsdp".
Traffic = dict[str, dict[str, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective of a compiled program."""

    kind: str
    axes: str  # of the mesh, along which its groups lie
    shape: str
    group_size: int
    wire_bytes: float  # that a device sends each time it runs
    runs: float  # a step
    is_in_loop: bool
    is_in_endless_loop: bool  # in a loop whose length only the data tells; `runs` counts it once
    source: str  # where it comes from in the Python code


def collectives(hlo: str, mesh_shape: dict[str, int]) -> list[Collective]:
    """All collectives of a partitioned program in HLO text, for a mesh of `mesh_shape`."""
    computations, entry = _computations(hlo)
    found: list[Collective] = []
    for name, runs, is_in_loop, is_endless in _visits(computations, entry):
        is_start = any("AsyncCollectiveStart" in line for line in computations[name])
        for line in computations[name]:
            match = _INSTRUCTION.match(line)
            if match is None or match["opcode"].removesuffix("-start") not in KINDS:
                continue
            if 'chain_id="' in line and not is_start:
                continue  # TPU: sent in parts beside other work, and named again at each part
            found.append(_collective(match, name, mesh_shape, runs, is_in_loop, is_endless))
    return found


_INSTRUCTION = re.compile(
    r"\s*(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<shape>\(.*?\)|\S+) (?P<opcode>[\w-]+)\((?P<rest>.*)$"
)
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and the name of the one that the program starts with."""
    found: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in hlo.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.-]+) .*\{\s*$", line)
        if head and not line.startswith((" ", "HloModule")):
            lines = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        else:
            lines.append(re.sub(r"/\*.*?\*/", "", line))
    if not entry:
        raise ValueError("the program has no ENTRY computation")
    return found, entry


def _visits(
    computations: dict[str, list[str]], entry: str
) -> Iterator[tuple[str, float, bool, bool]]:
    """Every path to a computation: name, runs a step, whether in a loop, in an endless one."""
    waiting = [(entry, 1.0, False, False)]
    while waiting:
        name, runs, is_in_loop, is_endless = waiting.pop()
        yield name, runs, is_in_loop, is_endless
        for line in computations[name]:
            called = _CALLED.findall(line)
            for branches in _BRANCHES.findall(line):
                called += [branch.strip().lstrip("%") for branch in branches.split(",")]
            is_loop = " while(" in line
            count = _TRIP_COUNT.search(line) if is_loop else None
            times = float(count[1]) if count else 1.0
            endless = is_endless or (is_loop and count is None)
            waiting += [(other, runs * times, is_in_loop or is_loop, endless) for other in called]


def _collective(
    match: re.Match[str],
    computation: str,
    mesh_shape: dict[str, int],
    runs: float,
    is_in_loop: bool,
    is_endless: bool,
) -> Collective:
    kind, rest = match["opcode"].removesuffix("-start"), match["rest"]
    group = _group(rest)
    size = len(group)
    num_bytes = _result_bytes(match["shape"], kind, is_start=match["opcode"].endswith("-start"))
    if kind == "all-reduce" and "all-reduce-scatter" in computation:
        # TPU: an all-reduce in a fusion of this name hands each device its own part alone.
        kind, num_bytes = "reduce-scatter", num_bytes / size
    scale = {
        "all-reduce": 2 * (size - 1) / size,
        "all-gather": (size - 1) / size,
        "reduce-scatter": size - 1.0,  # of the result, a part
        "all-to-all": (size - 1) / size,
        "collective-permute": 1.0,
    }[kind]
    source = re.search(r'op_name="([^"]*)"', rest)
    return Collective(
        kind=kind,
        axes=_axes(group, mesh_shape),
        shape=re.sub(r"\{[^}]*\}", "", match["shape"]),
        group_size=size,
        wire_bytes=scale * num_bytes,
        runs=runs,
        is_in_loop=is_in_loop,
        is_in_endless_loop=is_endless,
        source=source[1] if source else "",
    )


_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64}


def _result_bytes(shape: str, kind: str, *, is_start: bool) -> float:
    """Bytes of an instruction's result; of an asynchronous start, without its operand."""
    parts = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shape)
    if is_start and kind == "collective-permute":
        parts = parts[1:2]
    elif is_start and kind != "all-reduce":
        parts = parts[len(parts) // 2 :]
    return sum(
        (_BITS[dtype] if dtype in _BITS else int(re.sub(r"\D", "", dtype)))
        / 8
        * math.prod(int(n) for n in dimensions.split(",") if n)
        for dtype, dimensions in parts
    )


def _group(rest: str) -> list[int]:
    """One group of devices of a collective (of a permutation: a sender and its receiver)."""
    pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", rest)
    if pairs:
        pairs = [tuple(map(int, p)) for p in re.findall(r"\{(\d+),(\d+)\}", pairs[1])]
        moved = [list(pair) for pair in pairs if pair[0] != pair[1]]
        return moved[0] if moved else [0]
    text = re.search(r"replica_groups=(\S.*?)(?:, \w+=[^(]|$)", rest)
    if text is None:
        raise ValueError(f"a collective without groups: {rest[:200]}")
    groups = text[1]
    if groups.startswith("{{"):
        return [int(n) for n in groups[2:].split("}")[0].split(",")]
    iota = re.match(r"\[([\d,]+)\]<=(\S+)", groups)
    if iota:
        return _iota(iota[2]).reshape(_numbers(iota[1]))[0].tolist()
    named = re.search(r"mesh\[(.*?)\](?:, device_ids=\((.*?\)?)\))? \{(.*?)\}", rest)
    if named is None:
        raise ValueError(f"groups of an unknown form: {rest[:200]}")
    return _named_group(*named.groups())


def _named_group(mesh: str, ids: str | None, axes: str) -> list[int]:
    """The first group of `mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}`."""
    names = re.findall(r"'(\w+)'=(\d+)", mesh)
    shape = [int(size) for _, size in names]
    wanted = re.findall(r"'(\w+)'", axes)
    if ":" in axes:
        raise ValueError(f"groups along a part of an axis: {axes}")
    devices = np.arange(math.prod(shape)) if ids is None else _iota(ids)
    grid = devices.reshape(shape)
    index = tuple(slice(None) if name in wanted else 0 for name, _ in names)
    return grid[index].reshape(-1).tolist()


def _iota(text: str) -> np.ndarray:
    """0, 1, 2, … in the order of `[4,2]T(1,0)`: reshaped, transposed, flattened."""
    match = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if match is None:
        raise ValueError(f"an order of devices of an unknown form: {text}")
    shape = _numbers(match[1])
    grid = np.arange(math.prod(shape)).reshape(shape)
    return (grid.transpose(_numbers(match[2])) if match[2] else grid).reshape(-1)


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _axes(group: list[int], mesh_shape: dict[str, int]) -> str:
    """The axes along which the devices of a group differ, joined by +; "none" for one device."""
    places = np.stack(np.unravel_index(group, tuple(mesh_shape.values())), axis=-1)
    differs = (places != places[:1]).any(axis=0)
    return "+".join(np.array(list(mesh_shape))[differs]) or "none"


def traffic(found: Sequence[Collective]) -> Traffic:
    """Bytes that one device sends in a step, by axes and kind."""
    total: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for one in found:
        total[one.axes][one.kind] += one.wire_bytes * one.runs
    return {axes: dict(kinds) for axes, kinds in total.items()}
