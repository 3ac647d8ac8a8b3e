"""Measures of an edited clip."""
