"""A problem with a known answer: the teacher differs from the student by a matrix of rank 32.

One link of rank 4 can at best remove the four largest singular values (Eckart and Young); what is left is the tail.
Each further link does the same with the residual, and eight of them can remove it all.
"""

from __future__ import annotations

import itertools

import torch
from torch import nn

from cola_fast import attach

SIZE, RANK, R, LINKS, STEPS = 48, 32, 4, 8, 500


def test_one_link_floors_and_eight_reach_zero() -> None:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(SIZE, SIZE, bias=False))
    difference = torch.randn(SIZE, RANK) @ torch.randn(RANK, SIZE) / RANK
    target = student[0].weight.detach() + difference
    tail = torch.linalg.svdvals(difference)[R:].square().sum().item()

    x = torch.eye(SIZE)  # the loss is the squared Frobenius distance of the weights
    chain = attach(student, targets=["0"], r=R, alpha=R)
    losses = []
    for _ in range(LINKS):
        optimizer = torch.optim.AdamW(chain.parameters(), lr=0.05, weight_decay=0.0)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        for _ in range(STEPS):
            loss = (student(x) - target.t()).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
        chain.tie()
        losses.append((student(x) - target.t()).square().sum().item())
        chain.extend()

    assert tail <= losses[0] * 1.001, "no link can do better than the best approximation of its rank"
    assert losses[0] <= 1.05 * tail
    assert losses[-1] <= 0.01 * tail
    assert all(after < before for before, after in itertools.pairwise(losses))
