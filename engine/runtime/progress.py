"""Shows progress: a bar on a terminal, a plain line every few percent if the output is a file or a pipe."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

BAR = "{desc}: {percentage:3.0f}%|{bar:16}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
"""Format of a bar followed by numbers, with a fixed width of the bar, which tqdm would otherwise shrink to nothing."""
LINE = "{desc}: {n_fmt} of {total_fmt} ({percentage:.0f}%), {elapsed} so far, {remaining} left{postfix}"
PARTS = 20
"""Number of parts of the whole; a plain line follows each, every 5 percent."""
LEAST_S, MOST_S = 10.0, 600.0
"""Minimum and maximum seconds between two plain lines."""


class Progress(tqdm):
    """tqdm that also writes to logs. A closed stream (pipe or terminal) never ends the work."""

    def __init__(
        self,
        iterable: Iterable[Any] | None = None,
        desc: str = "",
        total: int | None = None,
        *,
        shown: bool = True,
        initial: int = 0,
        unit: str = "it",
        **options: Any,
    ) -> None:
        """shown: False writes nothing. The other arguments are tqdm's."""
        terminal = _is_terminal()
        self._plain = shown and not terminal
        self._title, self._first, self._unit = desc, initial, unit
        self._began = self._shown_at = time.monotonic()
        self._shown_parts = self._parts(initial, total)
        super().__init__(
            iterable,
            desc,
            total,
            disable=not (shown and terminal),
            initial=initial,
            unit=unit,
            dynamic_ncols=True,
            **options,
        )

    def show(self, numbers: Sequence[str]) -> None:
        """Shows numbers after the bar, the most important first, as many as fit the terminal."""
        self.postfix = None
        room = None
        if not self.disable and (columns := self.format_dict["ncols"]):
            room = columns - len(str(self)) - 4  # room for longer times
        fitting: list[str] = []
        for text in numbers:
            if room is not None and len(" ".join([*fitting, text])) > room:
                break
            fitting.append(text)
        self.set_postfix_str(" ".join(fitting), refresh=False)

    def update(self, n: float | None = 1) -> bool | None:
        if not self._plain:
            return super().update(n)
        self.n += n or 0
        now = time.monotonic()
        parts = self._parts(self.n, self.total)
        since = now - self._shown_at
        if since >= MOST_S or (parts > self._shown_parts and since >= LEAST_S):
            self._shown_at, self._shown_parts = now, parts
            line = self.format_meter(
                self.n,
                self.total,
                now - self._began,
                prefix=self._title,
                unit=self._unit,
                bar_format=LINE if self.total else None,
                postfix=getattr(self, "postfix", None),
                initial=self._first,
            )
            with contextlib.suppress(OSError, ValueError):
                print(line, file=sys.stderr, flush=True)
        return None

    @staticmethod
    def _parts(done: float, total: float | None) -> int:
        """Returns how many of the `PARTS` parts of the whole are done."""
        return int(PARTS * done / total) if total else 0

    def display(self, msg: str | None = None, pos: int | None = None) -> bool | None:
        with contextlib.suppress(OSError, ValueError):
            return super().display(msg, pos)
        return None

    def close(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            super().close()

    def __iter__(self) -> Iterator[Any]:
        if not self._plain:
            yield from super().__iter__()
            return
        for item in self.iterable:
            yield item
            self.update()


def _is_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # no stream, or a closed one
        return False
