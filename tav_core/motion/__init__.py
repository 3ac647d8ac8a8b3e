"""Tuned weights: in memory, on disk, compressed."""
