"""Run every benchmark."""

from benchmarks import step

step.main()
