"""DoRA: magnitude and direction of the weight's rows, trained apart. The gate is in `layers.output_gate`."""

from __future__ import annotations

from .registry import GATE, Gates, Method, Site, register

register(
    Method(
        "dora",
        "arXiv 2402.09353",
        "rows of `W + s·BA` are scaled to a trained length, that of W's at first; a tie leaves them so in the weight",
        {"chain": {"gate": "dora"}},
    )
)


@GATE.fill("dora")
def dora(site: Site) -> Gates:
    """`m = ‖W‖` by rows (eq. 5), so that c is 1."""
    from ..layers.output_gate import row_squares

    return Gates(magnitude=row_squares(site.weight).sqrt().to(site.dtype))
