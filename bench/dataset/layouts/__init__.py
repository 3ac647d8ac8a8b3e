"""Readers of public data sets of video edits: a file a family of layouts, and one kind of row for all."""

from .clips import PICTURES, VIDEOS, find_clip, pictures_of
from .reading import read_dataset
from .rows import BadRow, Place, Reading, Row

__all__ = ["PICTURES", "VIDEOS", "BadRow", "Place", "Reading", "Row", "find_clip", "pictures_of", "read_dataset"]
