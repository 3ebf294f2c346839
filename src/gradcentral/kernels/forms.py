"""What a cached plan relies on in the tensors it is used with."""

from __future__ import annotations

import operator
from collections.abc import Sequence

__all__ = ["same_objects"]


def same_objects(one: Sequence[object], other: Sequence[object]) -> bool:
    """Whether two sequences hold the very same objects; ``==`` would compare tensors element by element."""
    return len(one) == len(other) and all(map(operator.is_, one, other))
