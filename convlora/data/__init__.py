"""Data sets: files listed by split, read, transformed and batched."""

import os

# albumentations otherwise asks the network for a newer release at import
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
