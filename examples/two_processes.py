"""One chain, trained by two processes: on two GPUs, or on the CPU where there are none.

python examples/two_processes.py [MODEL]        run it again after a kill: it resumes
"""

import json
import subprocess
import sys
from pathlib import Path

model = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
folder = Path("runs/two-processes")
folder.mkdir(parents=True, exist_ok=True)
rows = [{"text": f"it was {word}"} for word in ("good", "bad", "long", "short") for _ in range(8)]
(folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
(folder / "config.yaml").write_text(f"""
out: {folder}/run
model: {{name: {model}}}
data: {{train: {folder}/rows.jsonl, eval_share: 0}}
schedule: {{links: 3, steps: 12}}
train:
  batch_size: 2
  accumulation: 2       # forward passes a step; each process takes one of them
  shard: true           # each process keeps half of the frozen base; without it, all
""")
launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]  # the same as `torchrun`
subprocess.run([*launcher, "-m", "cola_fast.cli", "train", str(folder / "config.yaml")], check=True)
