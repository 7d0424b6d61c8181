"""Data sets: each lists its files by split."""
