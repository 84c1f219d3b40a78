"""Machine code as text (SASS, by cuobjdump or nvdisasm): instructions, registers, and loops of one kernel."""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;")
LABEL = re.compile(r"^\s*(\.L_x_\d+):")
TARGET = re.compile(r"(?:0x([0-9a-f]+)|`\((\.L_x_\d+)\))$")
REGISTER = re.compile(r"\bR(\d+)\b")
ENDS = (
    "EXIT",
    "RET",
    "BRX",
    "JMX",
    "KILL",
)  # nothing comes behind, or nobody knows what: the targets of BRX are in a table


@dataclass(frozen=True)
class Instruction:
    """`@P0 LDS.128 R4, [R8+0x10]` at its address: predicate, name, operands."""

    address: int
    predicate: str
    name: str
    operands: str
    target: int | None = None  # of a jump

    @property
    def base(self) -> str:
        """The name without its suffixes: "LDS"."""
        return self.name.partition(".")[0]

    @property
    def written(self) -> set[int]:
        """Registers: all of a product, a load and an instruction of 64 bits, else the one that has a name."""
        first = REGISTER.findall(self.operands.partition(",")[0])
        if not first or self._stores or "[" in self.operands.partition(",")[0]:
            return set()
        return set(range(int(first[0]), int(first[0]) + self._width))

    @property
    def read(self) -> set[int]:
        """Registers: of a product all of both factors and of the sums, else those that have a name."""
        operands = self.operands.split(", ")
        if self.base == "HMMA":
            widths = (4, 2, 4)  # factors of 16 x 16 and 16 x 8, sums
            named = [(int(n), w) for one, w in zip(operands[1:], widths, strict=False) for n in REGISTER.findall(one)]
            return {n + i for n, width in named for i in range(width)}
        skipped = 0 if self._stores or "[" in operands[0] else 1
        return {int(n) for one in operands[skipped:] for n in REGISTER.findall(one)}

    @property
    def _stores(self) -> bool:
        return self.base.startswith(("ST", "RED", "BRA", "EXIT"))

    @property
    def _width(self) -> int:
        if self.base == "HMMA":
            return 4
        if self.base == "LDSM":
            return int(self.name[-1]) if self.name[-1] in "24" else 1
        return 4 if ".128" in self.name else 2 if ".64" in self.name or self.base == "CS2R" else 1


def instructions(assembly: str) -> list[Instruction]:
    """Those of the only kernel in the text, in order."""
    labels: dict[str, int] = {}
    waiting: list[str] = []
    found: list[tuple[int, str, str, str]] = []
    for line in assembly.splitlines():
        if label := LABEL.match(line):
            waiting.append(label[1])
        elif match := LINE.match(line):
            address = int(match[1], 16)
            labels |= dict.fromkeys(waiting, address)
            waiting.clear()
            found.append((address, match[2] or "", match[3], match[4]))
    addresses = [one[0] for one in found]
    assert addresses == sorted(set(addresses)), "more than one kernel"
    return [Instruction(*one, _target(one[2], one[3], labels)) for one in found]


def _target(name: str, operands: str, labels: dict[str, int]) -> int | None:
    jump = TARGET.search(operands) if name.partition(".")[0] in ("BRA", "CALL", "JMP") else None
    if jump is None:
        return None
    return labels[jump[2]] if jump[2] else int(jump[1], 16)


def loops(code: Sequence[Instruction]) -> list[list[Instruction]]:
    """The natural loops, smallest first, each in order of addresses: what lies between a place and the jumps back to it.

    All jumps back to one place are one loop. A wait that the compiler has moved behind the kernel's end belongs to its loop.
    """
    blocks, following = _graph(code)
    order, above = _dominators(following)
    before: dict[int, list[int]] = {b: [] for b in order}
    for b in order:
        for after in following[b]:
            before[after].append(b)
    bodies: dict[int, set[int]] = {}
    for b in order:
        for head in following[b]:
            if not _dominates(head, b, above):
                continue
            body, todo = bodies.setdefault(head, {head}), [b]
            while todo:
                at = todo.pop()
                if at not in body:
                    body.add(at)
                    todo += before[at]
    found = [[i for b in sorted(body) if b >= 0 for i in blocks[b]] for body in bodies.values()]
    return sorted(found, key=lambda loop: (len(loop), loop[0].address))


def innermost(found: Iterable[list[Instruction]], name: str) -> list[list[Instruction]]:
    """Of loops, smallest first, those that have an instruction of this name and no smaller such loop within."""
    chosen: list[list[Instruction]] = []
    for loop in found:
        inside = {i.address for i in loop}
        within = any(inside.issuperset(i.address for i in other) for other in chosen)
        if not within and any(i.base == name for i in loop):
            chosen.append(loop)
    return chosen


def shortest_turn(code: Sequence[Instruction], loop: Sequence[Instruction], name: str) -> list[Instruction]:
    """Of a loop, the instructions of the shortest way from the first instruction of this name round to it again."""
    blocks, following = _graph(code)
    inside = {i.address for i in loop}
    start = next(
        b for b, block in enumerate(blocks) if block[0].address in inside and any(i.base == name for i in block)
    )
    ways: list[tuple[int, list[int]]] = [(len(blocks[start]), [start])]
    seen: set[int] = set()
    while ways:
        length, way = heapq.heappop(ways)
        for after in following[way[-1]]:
            if after == start:
                return [i for b in way for i in blocks[b]]
            if blocks[after][0].address in inside and after not in seen:
                heapq.heappush(ways, (length + len(blocks[after]), [*way, after]))
        seen.add(way[-1])
    raise ValueError(f"no way round from {hex(blocks[start][0].address)}")


def ahead(loop: Sequence[Instruction], load: Instruction) -> int:
    """How many products of a loop come after a load, and before the first one that what it loads goes into.

    Followed from turn to turn in order of addresses, through moves and arithmetic. 0: the load is for the next product.
    """
    start = loop.index(load)
    holds, products = set(load.written), 0
    for i in [*loop[start + 1 :], *loop[: start + 1]]:
        reads = bool(i.read & holds)
        if i.base == "HMMA":
            if reads:
                return products
            products += 1
        wrote = i.written
        if reads:
            holds |= wrote
        elif not i.predicate:
            holds -= wrote
    return products


def _graph(code: Sequence[Instruction]) -> tuple[list[list[Instruction]], dict[int, list[int]]]:
    """Straight pieces of the code, and for each those that may follow; of -1, before all, those that nothing leads to."""
    jumps = {i.target for i in code if i.target is not None}
    blocks: list[list[Instruction]] = [[]]
    for i in code:
        if blocks[-1] and (i.address in jumps or blocks[-1][-1].target is not None or blocks[-1][-1].base in ENDS):
            blocks.append([])
        blocks[-1].append(i)
    place = {block[0].address: b for b, block in enumerate(blocks)}
    following: dict[int, list[int]] = {}
    for b, block in enumerate(blocks):
        last = block[-1]
        target = last.target if last.base != "CALL" else None  # which comes back
        always = not last.predicate and (last.base in ENDS or (target is not None and TARGET.match(last.operands)))
        after = [] if target is None else [place[target]]
        if not always and b + 1 < len(blocks):
            after.append(b + 1)
        following[b] = after
    named = {after for all_after in following.values() for after in all_after}
    following[-1] = []
    reached: set[int] = set()
    # the first one; then what no jump names, a case of BRX or a function; last what only a loop of its own leads to
    for b in sorted(range(len(blocks)), key=lambda b: (b > 0, b in named, b)):
        if b not in reached:
            following[-1].append(b)
        todo = [b]
        while todo:
            at = todo.pop()
            if at not in reached:
                reached.add(at)
                todo += following[at]
    return blocks, following


def _dominators(following: dict[int, list[int]]) -> tuple[list[int], dict[int, int]]:
    """Blocks in reverse postorder from -1, and for each the nearest one that every way to it leads through.

    Cooper, Harvey, Kennedy: A simple, fast dominance algorithm (2001).
    """
    order: list[int] = []
    seen, stack = {-1}, [(-1, iter(following[-1]))]
    while stack:
        at, rest = stack[-1]
        for after in rest:
            if after not in seen:
                seen.add(after)
                stack.append((after, iter(following[after])))
                break
        else:
            order.append(at)
            stack.pop()
    order.reverse()
    rank = {b: n for n, b in enumerate(order)}
    before: dict[int, list[int]] = {b: [] for b in order}
    for b in order:
        for after in following[b]:
            before[after].append(b)
    above = {-1: -1}
    changed = True
    while changed:
        changed = False
        for b in order[1:]:
            known = [p for p in before[b] if p in above]
            nearest = known[0]
            for p in known[1:]:
                while nearest != p:
                    if rank[nearest] > rank[p]:
                        nearest = above[nearest]
                    else:
                        p = above[p]
            if above.get(b) != nearest:
                above[b], changed = nearest, True
    return order, above


def _dominates(a: int, b: int, above: dict[int, int]) -> bool:
    while b != a and b != -1:
        b = above[b]
    return a == b
