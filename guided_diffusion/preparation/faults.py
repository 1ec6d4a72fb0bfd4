"""The faults that a data set can have."""

from dataclasses import asdict, dataclass
from typing import Any

# kind -> (whether a training run stops at it, what --fix-issues does; "" for nothing)
KINDS: dict[str, tuple[bool, str]] = {
    "unreadable image": (True, "leaves it out, with its mask"),
    "unreadable mask": (True, "leaves the pair out"),
    "image without mask": (True, "puts it into unlabelled/"),
    "mask without image": (True, "leaves it out"),
    "several of one name": (True, "leaves them all out"),
    "sizes differ": (True, "resizes the mask where the shapes agree, else leaves the pair out"),
    "value out of range": (True, "leaves the pair out"),
    "black-and-white mask": (True, "makes 255 class 1"),
    "colour mask": (True, "turns colours into classes, see tools/rgb2tif.py"),
    "blurred mask": (False, "gives stray pixels a class of their neighbours"),
    "lossy mask": (False, "saves black-and-white and colour masks afresh, leaves others out"),
    "empty mask": (False, ""),
    "blank image": (False, "leaves the pair out"),
    "exact duplicate": (False, "keeps one"),
    "near duplicate": (False, ""),
    "exact duplicate across splits": (False, "keeps the one that is not in TRAIN"),
    "near duplicate across splits": (False, "keeps the one that is not in TRAIN"),
    "unusual size": (False, ""),
}


@dataclass(frozen=True)
class Fault:
    """`name`: of the item (see layouts.Item), or the path where there is none."""

    kind: str
    name: str
    path: str
    text: str

    @property
    def stops_training(self) -> bool:
        return KINDS[self.kind][0]

    @property
    def repairable(self) -> bool:
        return bool(KINDS[self.kind][1])

    def to_plain(self) -> dict[str, Any]:
        return asdict(self) | {
            "stops_training": self.stops_training,
            "repairable": self.repairable,
        }


def fault_table(faults: list[Fault], examples: int = 3) -> str:
    """For the screen: each kind found, how often, what mends it, and a few files."""
    lines = []
    for kind, (stops, remedy) in KINDS.items():
        found = [fault for fault in faults if fault.kind == kind]
        if not found:
            continue
        weight = "stops training" if stops else "to look at"
        remedy = f"--fix-issues {remedy}" if remedy else "not mended by --fix-issues"
        lines.append(f"{len(found):5d}  {kind} ({weight}; {remedy})")
        lines += [f"         {fault.path}: {fault.text}" for fault in found[:examples]]
        if len(found) > examples:
            lines.append(f"         and {len(found) - examples} more")
    return "\n".join(lines)
