"""ICtCp, the matrix of some HDR clips that is no matrix of RGB: swscale does not know it (ITU-R BT.2100)."""

from __future__ import annotations

import numpy as np

_M1, _M2, _C1, _C2, _C3 = 1305 / 8192, 2523 / 32, 107 / 128, 2413 / 128, 2392 / 128
_A, _B, _C = 0.17883277, 0.28466892, 0.55991073
_RGB_OF_LMS = np.linalg.inv(np.array([[1688, 2146, 262], [683, 2951, 462], [99, 309, 3688]]) / 4096)
# Columns: how much Ct and Cp add to L, M and S.
_PQ = np.array([[0.008609, 0.111030], [-0.008609, -0.111030], [0.560031, -0.320627]])
_HLG = np.array([[0.015719, 0.209581], [-0.015719, -0.209581], [1.021271, -0.605274]])


def rgb_of_ictcp(i: np.ndarray, ct: np.ndarray, cp: np.ndarray, hlg: bool) -> np.ndarray:
    """Return the coded RGB [h, w, 3] in 0..1, with BT.2020's primaries, of planes in 0..1 and -0.5..0.5."""
    lms = i[..., None] + np.stack([ct, cp], -1) @ (_HLG if hlg else _PQ).T
    light = (_hlg_light(lms) if hlg else _pq_light(lms)) @ _RGB_OF_LMS.T
    return np.asarray(_hlg_signal(light) if hlg else _pq_signal(light))


def _pq_light(signal: np.ndarray) -> np.ndarray:
    root = signal.clip(0, 1) ** (1 / _M2)
    return np.asarray(((root - _C1).clip(0) / (_C2 - _C3 * root)) ** (1 / _M1))


def _pq_signal(light: np.ndarray) -> np.ndarray:
    power = light.clip(0, 1) ** _M1
    return np.asarray(((_C1 + _C2 * power) / (1 + _C3 * power)) ** _M2)


def _hlg_light(signal: np.ndarray) -> np.ndarray:
    signal = signal.clip(0, 1)
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - _C) / _A) + _B) / 12)


def _hlg_signal(light: np.ndarray) -> np.ndarray:
    light = light.clip(0, 1)
    return np.where(light <= 1 / 12, np.sqrt(3 * light), _A * np.log((12 * light - _B).clip(1e-9)) + _C)
