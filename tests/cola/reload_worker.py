"""A process that knows nothing of the one that exported: how far PEFT's logits are from the live model's.

python -m tests.cola.reload_worker FOLDER        FOLDER/*/base, adapter, live.safetensors -> {name: difference}

None where PEFT refuses the adapter.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

if __name__ == "__main__":
    found: dict[str, float | None] = {}
    for case in sorted(Path(sys.argv[1]).iterdir()):
        base = AutoModelForCausalLM.from_pretrained(case / "base")
        found[case.name] = None
        with contextlib.suppress(ValueError):
            peft = PeftModel.from_pretrained(base, case / "adapter").eval()
            tensors = load_file(case / "live.safetensors")
            with torch.no_grad():
                logits = peft(tensors["ids"]).logits
            found[case.name] = float((logits - tensors["logits"]).norm() / tensors["logits"].norm())
    print(json.dumps(found))
