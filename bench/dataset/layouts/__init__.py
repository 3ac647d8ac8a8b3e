"""Readers of public data sets of video edits: a file a family of layouts, and one kind of row for all."""

from .clips import PICTURES, VIDEOS, BadRow, find_clip, pictures_of, with_video_ending
from .reading import STUDY, read_dataset
from .rows import Place, Reading, Row
from .table import read_table

__all__ = [
    "PICTURES",
    "STUDY",
    "VIDEOS",
    "BadRow",
    "Place",
    "Reading",
    "Row",
    "find_clip",
    "pictures_of",
    "read_dataset",
    "read_table",
    "with_video_ending",
]
