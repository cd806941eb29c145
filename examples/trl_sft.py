"""A chain of two links on chat data in TRL's SFTTrainer; the result is one PEFT adapter.

python examples/trl_sft.py [MODEL]
"""

import sys

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import cola_fast

CHATS = [
    ("What is a chain?", "Links, tied one after another."),
    ("What is a link?", "A small low-rank update of the weights."),
    ("What does a tie do?", "It folds a link into the weights."),
    ("And then?", "A fresh link is opened."),
]

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)
data = Dataset.from_dict(
    {"messages": [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in CHATS]}
)

chain = cola_fast.attach(model, r=8, alpha=16, targets="all-linear")
trainer = SFTTrainer(
    model=model,
    args=SFTConfig("runs/trl", max_steps=8, learning_rate=1e-3, logging_steps=2, bf16=False, report_to=[]),
    train_dataset=data,
    processing_class=tokenizer,
    callbacks=[cola_fast.ChainCallback(chain, links=2, lr_span="restart")],
)
trainer.train()
print(chain.export_adapter("runs/trl/adapter", rank=8))  # both links in one adapter, cut to rank 8
