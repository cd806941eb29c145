"""Your PEFT model, on our kernels: one line, and one to undo it.

python examples/peft_drop_in.py [MODEL]
"""

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import cola_fast

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
tokenizer = AutoTokenizer.from_pretrained(name)
model = get_peft_model(
    AutoModelForCausalLM.from_pretrained(name), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
)

report = cola_fast.accelerate_peft(model)  # the line
print(report)

batch = tokenizer("It was good", return_tensors="pt").to(model.device)
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
for step in range(5):
    loss = model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}")

report.undo()
model.save_pretrained("runs/peft-drop-in")  # PEFT's own, accelerated or not
