"""Pairs of edits to compare, and what each voter sees of them: a random order, random sides, no names."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from dataset import jobs, results, scoring
from dataset.layouts import Row
from tune_a_video.tav_core.media.encode import save_clip

SIDES = ("left", "right")
# The broken side of a catch trial is called this; it never wins by right.
BROKEN = "broken on purpose"
_LEAST_SIDE, _FPS = 256, 8.0


@dataclass(frozen=True)
class Pair:
    """Two edits of one clip by the same sentence. ``number`` names the pair; ``methods`` made ``videos``.

    The second method of a catch trial is ``BROKEN``.
    """

    number: str
    clip: str
    sentence: str
    source: Path
    methods: tuple[str, str]
    videos: tuple[Path, Path]

    @property
    def is_catch(self) -> bool:
        """Whether the right answer is known."""
        return BROKEN in self.methods


class Secret:
    """Draws that are random to voters and the same after a restart."""

    def __init__(self, file: Path) -> None:
        if not file.exists():
            results.write_whole(file, secrets.token_hex(32))
        self._key = bytes.fromhex(file.read_text())

    def draw(self, *parts: str) -> int:
        """Return a number of 64 bits that belongs to these texts."""
        return int.from_bytes(hmac.digest(self._key, json.dumps(parts).encode(), "sha256")[:8], "big")

    def order(self, voter: str, pairs: Sequence[Pair]) -> list[Pair]:
        """Return the pairs in this voter's order."""
        return sorted(pairs, key=lambda pair: self.draw("order", voter, pair.number))

    def sides(self, voter: str, pair: Pair) -> tuple[int, int]:
        """Return which of the pair's two edits is on the left and on the right for this voter."""
        return (0, 1) if self.draw("side", voter, pair.number) % 2 else (1, 0)


def make_pairs(
    output: Path, rows: Sequence[Row], systems: Mapping[str, Path], ours: str, catch: int, folder: Path
) -> list[Pair]:
    """Pair ``ours`` with every other system on every edit, add ``catch`` catch trials, and write their videos.

    ``output``: the study's folder; ``folder``: where videos go, under names that say nothing. Edits that a system
    lacks are left out.
    """
    pairs, whole = [], []
    for row in rows:
        places = {name: results.find_edit(system, row) for name, system in systems.items()}
        if places[ours] is None:
            continue
        source = torch.from_numpy(results.read_frames(output / "source" / results.clip_id(row))).float() / 255
        size = (source.shape[2], source.shape[1])
        source_video = _video(folder, source, f"source {results.clip_id(row)}")
        ours_frames = scoring.load_edit(places[ours], len(source), size)
        ours_video = _video(folder, ours_frames, f"{ours} {row.split} {row.video} {row.name}")
        clip = f"{row.split}/{row.video}"
        whole.append((clip, row.edit, source_video, ours_frames, ours_video))
        for name, place in places.items():
            if name != ours and place is not None:
                frames = scoring.load_edit(place, len(source), size)
                video = _video(folder, frames, f"{name} {row.split} {row.video} {row.name}")
                number = _number(ours, clip, row.name, name)
                pairs.append(Pair(number, clip, row.edit, source_video, (ours, name), (ours_video, video)))
    for index, (clip, sentence, source_video, _, video) in enumerate(whole[:catch]):
        # A catch trial shows a spoilt video of another sentence: it is worse in both questions.
        others = [each[3] for each in whole if each[1] != sentence] or [whole[index][3]]
        bad = _video(folder, broken(others[index % len(others)], index), f"{BROKEN} {index}")
        number = _number(ours, clip, sentence, BROKEN)
        pairs.append(Pair(number, clip, sentence, source_video, (ours, BROKEN), (video, bad)))
    return pairs


def _number(ours: str, *parts: str) -> str:
    """Return a pair's identity. It leaves out the default ``ours``, so that votes made before keep their pairs."""
    parts = parts if ours == jobs.TUNED else (*parts, ours)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def broken(frames: torch.Tensor, seed: int) -> torch.Tensor:
    """Spoil a video [n, h, w, 3] so that nobody prefers it: wrong order, flicker, and every second frame inverted."""
    generator = np.random.default_rng(seed)
    spoilt = frames[torch.from_numpy(generator.permutation(len(frames)))].clone()
    spoilt[::2] = 1 - spoilt[::2]
    light = torch.from_numpy(generator.uniform(0.3, 1, len(frames))).float()
    return spoilt * light.view(-1, 1, 1, 1)


def _video(folder: Path, frames: torch.Tensor, content: str) -> Path:
    """Write a video under a name that says nothing of its content; one that is there stays."""
    pixels = (frames * 255).round().byte().numpy().tobytes()
    file = folder / f"{hashlib.sha256(content.encode() + pixels).hexdigest()[:24]}.mp4"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        factor = -(-_LEAST_SIDE // min(frames.shape[1:3]))
        save_clip(frames.repeat_interleave(factor, 1).repeat_interleave(factor, 2), _FPS, file, quality=90)
    return file
