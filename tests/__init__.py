"""Tests, in a tree that mirrors the packages: tests/engine/data/ tests engine/data/, and so on.

What several files share: fixtures in conftest.py, everything else in helpers/, imported as `tests.helpers`.
"""
