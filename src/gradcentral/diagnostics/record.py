"""What `Monitor` records at one step, its JSON and CSV forms, and the buffer of records in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

__all__ = ["CSV_COLUMNS", "NET", "Reading", "Record", "RecordBuffer"]

NET = "(net)"  # instead of the name of a parameter


@dataclass(frozen=True)
class Reading:
    """Measurements of one parameter, or of the whole net; None if there is no finite value.

    Attributes:
        share: fraction of the gradient's energy that centering removes, between 0 and 1.
        norm, centered_norm: L2 norm of the gradient g and of Φ(g).
        largest, centered_largest: largest absolute entry of g and of Φ(g).
        drift, largest_drift: ‖eᵀ(w − w⁰)‖ over all weight vectors together (L2), and the largest of a single one.
        sensitivity, largest_sensitivity: root mean square and maximum of |1ᵀw| over the output units: how much a
            unit's output changes when 1 is added to each of its inputs.
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
        # JSON has no NaN.
        for name, value in vars(self).items():
            if value is not None and not math.isfinite(value):
                object.__setattr__(self, name, None)

    def items(self) -> list[tuple[str, float]]:
        """Return the measurements that are not None, with their names."""
        return [(name, value) for name, value in vars(self).items() if value is not None]


_READINGS = tuple(field.name for field in fields(Reading))
CSV_COLUMNS = ("step", "placement", "skipped", "parameter", *_READINGS)


@dataclass(frozen=True)
class Record:
    """What GC did, or would have done, at one step.

    Attributes:
        step: number of steps taken before; gradient and weights are those that this step started from.
        placement: placement of the GC that is attached to the optimizer; None if none is attached or it is paused,
            and the values of Φ(g) are what it would have done.
        skipped: whether a GradScaler made a fused optimizer skip the step because the gradient was not finite. (It
            does not call ``step()`` of other optimizers then, so those steps are neither counted nor recorded.)
        net: the whole net; its gradient includes the parameters that are not centered.
        layers: {name: reading} of the centered parameters.
    """

    step: int
    placement: str | None
    skipped: bool
    net: Reading
    layers: Mapping[str, Reading]

    def to_line(self) -> str:
        """Format the record as one line of JSON, with six significant digits."""
        return json.dumps(asdict(self, dict_factory=_rounded), allow_nan=False)

    @classmethod
    def from_line(cls, line: str) -> Record:
        """Parse the output of `to_line`."""
        values = json.loads(line)
        readings = {name: Reading(**reading) for name, reading in values.pop("layers").items()}
        return cls(net=Reading(**values.pop("net")), layers=readings, **values)

    def to_rows(self) -> list[list[Any]]:
        """Format the record as one row of `CSV_COLUMNS` per parameter, and a last one for the whole net."""
        header = [self.step, self.placement, self.skipped]
        readings = {**self.layers, NET: self.net}
        return [[*header, name, *_rounded(vars(reading).items()).values()] for name, reading in readings.items()]

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, str]]) -> Record:
        """Parse the output of `to_rows`, as `csv.DictReader` reads it."""
        readings = {
            row["parameter"]: Reading(*(float(row[name]) if row[name] else None for name in _READINGS)) for row in rows
        }
        last, net = rows[-1], readings.pop(NET)
        return cls(int(last["step"]), last["placement"] or None, last["skipped"] == "True", net, readings)


class RecordBuffer:
    """A bounded number of records, evenly spaced over all that were added, with the first and the newest.

    Examples:
        >>> buffer = RecordBuffer(limit=5)
        >>> for step in range(12):
        ...     buffer.add(Record(step, None, False, Reading(), {}))
        >>> [record.step for record in buffer.records]
        [0, 4, 8, 11]
    """

    def __init__(self, limit: int = 1000) -> None:
        self.records: list[Record] = []
        self._limit = limit

    def add(self, record: Record) -> None:
        """Append a record; if the buffer is full, drop every second one first."""
        records = self.records
        if len(records) > 2 and records[-1].step - records[-2].step < records[1].step - records[0].step:
            records.pop()  # kept so far only as the newest
        if len(records) == self._limit:
            del records[1::2]
        records.append(record)

    def rewind(self, step: int) -> None:
        """Drop the records of this step and later ones, to continue from an earlier checkpoint."""
        self.records = [record for record in self.records if record.step < step]


def _rounded(items: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Round floats to six significant digits."""
    return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in items}
