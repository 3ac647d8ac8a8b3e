"""Clips and pictures: from files to frames and back."""
