"""Without a GPU the Triton kernels run interpreted, which Triton decides when it is first imported: hence here."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
