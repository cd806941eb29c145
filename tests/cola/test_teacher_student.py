"""A problem with a known answer: the teacher differs from the student by a matrix of rank 32.

One link of rank 4 can at best remove the four largest singular values (Eckart and Young); what is left is the tail.
Each further link does the same with the residual, and eight of them can remove it all.
"""

from __future__ import annotations

import itertools
import math

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


def test_the_frank_wolfe_gap_falls_at_least_as_fast_as_the_root_of_the_links() -> None:
    """f(W) = |W - W*|² / 2 over the nuclear-norm ball around W0 that just holds W*, links of rank 1 as the directions.

    The gap max <W - V, grad f(W)> over V in the ball is <W - W0, G> + radius · |G|, G = W - W* in the spectral norm. It
    bounds f(W) - f(W*) from above, and COLA's theorem (arXiv 2401.04151) bounds the least of t by a constant / sqrt(t).
    """
    torch.manual_seed(1)
    links, steps, size = 10, 300, 16
    u, v = (torch.linalg.qr(torch.randn(size, size))[0] for _ in range(2))
    sigma = 1 / torch.arange(1, size + 1)
    student = nn.Sequential(nn.Linear(size, size, bias=False))
    start = student[0].weight.detach().clone()
    target = start + u @ sigma.diag() @ v
    chain = attach(student, targets=["0"], r=1, alpha=1)

    def gap() -> float:
        g = student[0].weight.detach() - target
        inner = ((student[0].weight.detach() - start) * g).sum()
        return float(inner + sigma.sum() * torch.linalg.matrix_norm(g, 2))

    gaps, losses = [gap()], [float((start - target).square().sum() / 2)]
    for _ in range(links):
        optimizer = torch.optim.AdamW(chain.parameters(), lr=0.05, weight_decay=0.0)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            optimizer.zero_grad()
            ((student(torch.eye(size)) - target.t()).square().sum() / 2).backward()
            optimizer.step()
            decay.step()
        chain.tie()
        gaps.append(gap())
        losses.append(float((student[0].weight.detach() - target).square().sum() / 2))
        chain.extend()
    best = list(itertools.accumulate(gaps, min))
    assert all(g >= f for g, f in zip(gaps, losses, strict=True)), "the gap is an upper bound of what is left"
    assert all(g <= gaps[0] / math.sqrt(t) for t, g in enumerate(best, start=1)), best
    assert best[-1] < gaps[0] / links, "and here faster: the singular values fall like 1 / t"
