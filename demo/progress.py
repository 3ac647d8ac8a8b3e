"""Progress on a terminal, or in a log."""

from __future__ import annotations

import sys
import time


class Bar:
    """One line per piece of work: on a terminal it is rewritten at every step, in a log it is written once."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total, self.started = name, total, time.monotonic()

    def show(self, done: int) -> None:
        """``done`` of the steps are."""
        if done == self.total:
            print(f"  {self.name}: {done} steps, {time.monotonic() - self.started:.0f} s", flush=True)
        elif sys.stdout.isatty():
            print(f"  {self.name}: {done} of {self.total}", end="\r", flush=True)
