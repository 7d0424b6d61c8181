"""Run every benchmark."""

import subprocess
import sys

for name in ("experts", "attention", "step", "predict"):
    subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)
