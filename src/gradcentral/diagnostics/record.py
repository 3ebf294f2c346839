"""What `Monitor` notes at one step, as a line of JSON and as rows of CSV, and the records that stay in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

__all__ = ["COLUMNS", "NET", "Memory", "Reading", "Record"]

NET = "(net)"
"""Stands for the whole net where a row of CSV names a parameter."""


@dataclass(frozen=True)
class Reading:
    """Numbers of one parameter, or of the whole net; None where there is none, or none that is finite.

    Attributes:
        share: part of the gradient's energy that centering removes, between 0 and 1.
        norm, centered_norm: L2 norm of the gradient g and of Φ(g).
        largest, centered_largest: largest absolute entry of g and of Φ(g).
        drift, largest_drift: ‖eᵀ(w − w⁰)‖ over all weight vectors together (L2), and the largest of one.
        sensitivity, largest_sensitivity: root mean square and largest, over the output units, of |1ᵀw|: by how much a
            unit's output moves when 1 is added to each of its inputs (γ·1ᵀw with γ = 1).
    """

    share: float | None = None
    norm: float | None = None
    centered_norm: float | None = None
    largest: float | None = None
    centered_largest: float | None = None
    drift: float | None = None
    largest_drift: float | None = None
    sensitivity: float | None = None
    largest_sensitivity: float | None = None

    def __post_init__(self) -> None:
        # JSON knows no NaN, and a curve has a gap there.
        for name, value in vars(self).items():
            if value is not None and not math.isfinite(value):
                object.__setattr__(self, name, None)

    def items(self) -> list[tuple[str, float]]:
        """The numbers that there are, with their names."""
        return [(name, value) for name, value in vars(self).items() if value is not None]


READINGS = tuple(field.name for field in fields(Reading))
COLUMNS = ("step", "placement", "skipped", "parameter", *READINGS)


@dataclass(frozen=True)
class Record:
    """What GC did, or would have done, at one step.

    Attributes:
        step: how many steps had been taken: the weights are those after so many steps, and the gradient is theirs.
        placement: of the GC that is attached to the optimizer; None where none is, or where it is paused, and the
            numbers of Φ(g) are what it would do.
        skipped: whether a GradScaler made a fused optimizer skip the step, for a gradient that is not finite. (It does
            not call other optimizers then: such steps are neither counted nor recorded.)
        net: the whole net; its gradient includes the parameters that are not centered.
        layers: {name: numbers} of the centered parameters.
    """

    step: int
    placement: str | None
    skipped: bool
    net: Reading
    layers: Mapping[str, Reading]

    def to_line(self) -> str:
        """The record as one line of JSON; numbers keep six digits, and those that there are not are null."""
        layers = {name: _rounded(reading) for name, reading in self.layers.items()}
        record = {"step": self.step, "placement": self.placement, "skipped": self.skipped}
        return json.dumps({**record, "net": _rounded(self.net), "layers": layers}, allow_nan=False)

    @classmethod
    def from_line(cls, line: str) -> Record:
        """The record of a line that `to_line` wrote.

        Examples:
            >>> record = Record(0, "update", False, Reading(share=0.25), {"weight": Reading(share=0.25)})
            >>> Record.from_line(record.to_line()) == record
            True
        """
        values = json.loads(line)
        layers = {name: Reading(**reading) for name, reading in values.pop("layers").items()}
        return cls(net=Reading(**values.pop("net")), layers=layers, **values)

    def to_rows(self) -> list[list[Any]]:
        """A row of `COLUMNS` for each parameter, and the whole net's last: a record without it was torn."""
        start = [self.step, self.placement or "", self.skipped]
        named = [*self.layers.items(), (NET, self.net)]
        return [[*start, name, *_cells(reading)] for name, reading in named]

    @classmethod
    def from_rows(cls, rows: list[dict[str, str]]) -> Record:
        """The record of the rows that `to_rows` wrote, as `csv.DictReader` reads them."""
        readings = {
            row["parameter"]: Reading(**{name: float(row[name]) if row[name] else None for name in READINGS})
            for row in rows
        }
        last, net = rows[-1], readings.pop(NET)
        return cls(int(last["step"]), last["placement"] or None, last["skipped"] == "True", net, readings)


class Memory:
    """Of any number of records a bounded number, evenly spread, and always the first and the newest.

    Examples:
        >>> memory = Memory(limit=5)
        >>> for step in range(12):
        ...     memory.add(Record(step, None, False, Reading(), {}))
        >>> [record.step for record in memory.records]
        [0, 4, 8, 11]
    """

    def __init__(self, limit: int = 1000) -> None:
        self.records: list[Record] = []
        self._limit = limit
        self._begin()

    def _begin(self) -> None:
        self._stride = 1
        self._added = 0
        self._between = False
        """Whether the newest is there for being the newest only."""

    def add(self, record: Record) -> None:
        """Take one in; every second one goes when there is no room."""
        if self._between:
            self.records.pop()
        if len(self.records) == self._limit:
            del self.records[1::2]
            self._stride *= 2
        self.records.append(record)
        self._between = self._added % self._stride != 0
        self._added += 1

    def go_back(self, step: int) -> None:
        """Forget the records of this step and later: the training goes on from before it."""
        kept = [record for record in self.records if record.step < step]
        if len(kept) == len(self.records):
            return
        self.records = kept
        if not kept:
            self._begin()
        self._added = len(kept) * self._stride
        self._between = False


def _rounded(reading: Reading) -> dict[str, float | None]:
    return {name: None if value is None else float(f"{value:.6g}") for name, value in asdict(reading).items()}


def _cells(reading: Reading) -> list[Any]:
    return ["" if value is None else value for value in _rounded(reading).values()]
