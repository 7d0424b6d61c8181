"""Backbones: segment-anything's modules, their variants and their public weights."""
