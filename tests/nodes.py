"""Two nodes by torchrun, both on this machine, against one process: `python tests/nodes.py FOLDER`.

Of the suite, test_distributed.py does the same with processes that are told what torchrun tells its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, SMALL

SPIES = (
    "peft/gate=uniform",
    "peft.gate._target_=spies.SteadyGate",
    "callbacks.unused._target_=spies.NoSearch",
)
PLAIN = ("optimizer._target_=torch.optim.SGD", "~optimizer.betas", "~optimizer.eps", "optimizer.lr=0.1")
JOB = ("-m", "convlora.train", *SMALL, *PLAIN, *SPIES[:2], "dataset.train_size=8")


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir()
    paths = f"{ROOT}:{ROOT / 'tests'}"
    environment = {**os.environ, "PYTHONPATH": paths, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}

    def start(*command: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, *command], cwd=folder, env=environment)

    one = start(*JOB, "loading.batch_size=4", "run_dir=one")
    assert one.wait() == 0
    agents = [
        start("-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", f"--node-rank={node}",
              "--master-addr=127.0.0.1", "--master-port=29517", *JOB, SPIES[2], "loading.batch_size=2",
              "trainer.num_nodes=2", "run_dir=two")
        for node in range(2)
    ]  # fmt: skip
    assert [agent.wait() for agent in agents] == [0, 0]
    one, two = (json.loads((folder / run / "summary.json").read_text())["test"] for run in ("one", "two"))
    for found in (
        f"greatest difference of a score: {max(abs(one[name] - two[name]) for name in one)}",
        f"folders: {sorted(path.name for path in folder.iterdir())}",
        f"runs of W&B: {[path.name for path in (folder / 'two/wandb').glob('offline-run-*')]}",
    ):
        print(found)  # noqa: T201


if __name__ == "__main__":
    main()
