"""One-shot tuning (paper, section 4.2)."""
