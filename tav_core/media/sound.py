"""The sound of a clip."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import psutil
import torch
from einops import rearrange

from .probe import VideoInfo
from .process import CannotReadError, TimeLimitError, read

SOUND_LIMIT = 120  # seconds
MOST_SOUND = 48000 * 2 * 4 * 4  # bytes a second while sound is read: stereo, and some copies

Audio = dict[str, Any]  # the host's AUDIO: waveform [1, channels, samples] float32, sample_rate in Hz


def read_audio(info: VideoInfo, start: float, duration: float) -> Audio | None:
    """Return the audio track that a player takes from ``start`` for ``duration`` seconds, silent where it has a gap.

    None if the track has no sound in that span, or cannot be decoded (which is logged, not raised).
    """
    if not duration * MOST_SOUND < psutil.virtual_memory().available:
        logging.warning("%s: %g seconds of sound do not fit in memory and are left out", info.name, duration)
        return None
    extra = round(duration * MOST_SOUND)
    span = {"path": info.path, "start": start, "duration": duration, "shifts": info.shifts}
    try:
        found = next(read("av", "sound", SOUND_LIMIT, extra, **span), None)
    except TimeLimitError:
        logging.warning("%s: its sound could not be read in time and is left out", info.name)
        return None
    except CannotReadError as error:
        logging.warning("%s: its sound cannot be decoded and is left out (%s)", info.name, error)
        return None
    if found is None:
        return None
    header, samples = found
    waveform = rearrange(np.frombuffer(samples, np.float32), "(c n) -> 1 c n", c=header["channels"])
    return {"waveform": torch.from_numpy(waveform.copy()), "sample_rate": header["rate"]}
