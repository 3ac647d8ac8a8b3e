"""Captions are readable in every script that a font of the system has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import matplotlib
import pytest
from tune_a_video.tav_core.media import pictures

DEJAVU = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


@pytest.fixture(autouse=True)
def other_fonts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A system whose one font has accents and Cyrillic, but no Chinese."""
    monkeypatch.setattr(pictures, "_FONTS", ("no such font.ttf", str(DEJAVU)))
    for cached in (pictures.font_for, pictures._system_fonts):
        cached.cache_clear()
    yield
    for cached in (pictures.font_for, pictures._system_fonts):
        cached.cache_clear()


def test_a_caption_gets_a_font_that_has_its_characters(caplog: pytest.LogCaptureFixture) -> None:
    assert pictures.font_for("a red star").path != str(DEJAVU)
    assert pictures.font_for("\u0434\u043e\u043c, caf\u00e9").path == str(DEJAVU)
    assert not caplog.records


def test_a_caption_that_no_font_has_is_told(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        pictures.font_for("\u661f \ubcc4")
    assert len(caplog.records) == 1 and "install Noto Sans CJK" in caplog.text
