"""`make test` gives long test files to its processes before short ones."""

from types import SimpleNamespace

from tests.helpers.order import slow_files_first
from tests.helpers.paths import ROOT

ITEMS = [("short", ""), ("b", "slow"), ("long", "slow"), ("long", ""), ("b", ""), ("long", "slow"), ("other", "")]


def test_files_with_slow_tests_come_first_and_keep_the_order_of_their_tests():
    items = [
        SimpleNamespace(path=path, number=number, get_closest_marker=lambda name, mark=mark: mark == name)
        for number, (path, mark) in enumerate(ITEMS)
    ]
    assert [item.number for item in slow_files_first(items)] == [2, 3, 5, 1, 4, 0, 6]


def test_xdist_keeps_that_order():
    """Its own order, files with the most tests first, would leave long files with few tests to the end."""
    arguments = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("XDIST :="))
    assert "--dist loadfile --no-loadscope-reorder" in arguments
