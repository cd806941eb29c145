"""A chain of three links in transformers' Trainer.

python examples/trainer_callback.py [MODEL]        run it again after a kill: it resumes
"""

import sys
from pathlib import Path

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import cola_fast

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
out = Path("runs/trainer")
tokenizer = AutoTokenizer.from_pretrained(name)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(name)
rows = [tokenizer(f"it was {word}") for word in ("good", "bad", "long", "short") for _ in range(8)]

chain = cola_fast.attach(model, r=8, alpha=16)
trainer = Trainer(
    model=model,
    args=TrainingArguments(out, max_steps=12, save_steps=2, learning_rate=1e-3, logging_steps=4, report_to=[]),
    train_dataset=rows,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    callbacks=[cola_fast.ChainCallback(chain, links=3)],
)
trainer.train(resume_from_checkpoint=any(out.glob("checkpoint-*")))
print(f"{len(chain.links)} links")
chain.export_merged(out / "merged", tokenizer)  # loads with transformers alone
