"""The order in which parallel processes take the test files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest


def slow_files_first(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """Returns the tests by file, files with the most slow tests first; a file's tests keep their order.

    Each process takes the next file when it has finished one, so short files at the end keep all processes busy: a
    long file that one process takes last would leave the others idle.
    """
    items = list(items)
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    first = {item.path: place for place, item in reversed(list(enumerate(items)))}
    return sorted(items, key=lambda item: (-slow[item.path], first[item.path]))
