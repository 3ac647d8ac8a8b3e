"""Votes in one file that only grows: a line of JSON each, on the disk before the voter is thanked."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# The paper's two questions (section 5.2).
QUESTIONS = {
    "consistency": "Which video is more consistent over time?",
    "text": "Which video follows the sentence better?",
}


class Answers:
    """The votes of a file. ``add`` counts a vote once, whatever is sent again; threads may call it at once.

    Raises OSError on opening if another process holds the file.
    """

    def __init__(self, file: Path) -> None:
        self.path = file
        self._lock = threading.Lock()
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        _lock(self._file)
        self.votes, whole = read_votes(file)
        if whole < os.fstat(self._file).st_size:
            # A kill cut the last line short; its voter was not thanked, and sends it again.
            os.ftruncate(self._file, whole)
        self._known = {vote["id"] for vote in self.votes}
        self._answered = {(vote["voter"], vote["pair"]) for vote in self.votes}

    def add(self, vote: Mapping[str, Any]) -> bool:
        """Write a vote; return whether it is new. A known ``id``, or a second one of a voter on a pair, is not.

        Raises OSError if it cannot be written; then nothing is kept of it.
        """
        line = (json.dumps(dict(vote)) + "\n").encode()
        with self._lock:
            if vote["id"] in self._known or (vote["voter"], vote["pair"]) in self._answered:
                return False
            end = os.fstat(self._file).st_size
            try:
                written = 0
                while written < len(line):
                    written += os.write(self._file, line[written:])
                os.fsync(self._file)
            except OSError:
                os.ftruncate(self._file, end)
                raise
            self._known.add(vote["id"])
            self._answered.add((vote["voter"], vote["pair"]))
            self.votes.append(dict(vote))
            return True

    def answered(self, voter: str, pair: str) -> bool:
        """Return whether a voter has voted on a pair."""
        with self._lock:
            return (voter, pair) in self._answered

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._file)


def read_votes(file: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the votes of a file, each once, and the length in bytes of its whole lines.

    Raises ValueError with the line's number for a line that is no vote.
    """
    votes: list[dict[str, Any]] = []
    ids, places, whole = set(), set(), 0
    for number, line in enumerate(file.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        whole += len(line)
        try:
            vote = json.loads(line)
            place = (vote["voter"], vote["pair"])
            known = vote["id"] in ids or place in places
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}:{number}: this is no vote") from error
        if not known:
            votes.append(vote)
        ids.add(vote["id"])
        places.add(place)
    return votes, whole


def _lock(file: int) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
