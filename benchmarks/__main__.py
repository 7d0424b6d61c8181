"""Run every benchmark."""

import subprocess
import sys

for name in (
    "experts",
    "attention",
    "step",
    "gates",
    "evidence",
    "memory",
    "predict",
    "folder",
    "scenes",
    "scores",
    "resize",
):
    subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)
