"""The chain family. A method is a preset of configuration keys; what a key cannot say is a function in a slot.

Each file of this folder registers what it defines, and every file is found by itself: adding a method adds one file and
touches no other. Nothing here imports torch before a function is called, since the configuration reads the names.
"""

import importlib
import pkgutil

from .registry import (
    AFTER_STEP,
    GATE,
    GRADIENT,
    INIT,
    METHODS,
    OPTIMIZER,
    PERTURB,
    RANKS,
    SCALING,
    SLOTS,
    STATE,
    WANTS,
    Gates,
    Method,
    Pair,
    Site,
    Step,
    Wants,
    preset,
    register,
    table,
    wanted_by,
)

for _found in sorted(module.name for module in pkgutil.iter_modules(__path__)):
    importlib.import_module(f".{_found}", __name__)

__all__ = [
    "AFTER_STEP",
    "GATE",
    "GRADIENT",
    "INIT",
    "METHODS",
    "OPTIMIZER",
    "PERTURB",
    "RANKS",
    "SCALING",
    "SLOTS",
    "STATE",
    "WANTS",
    "Gates",
    "Method",
    "Pair",
    "Site",
    "Step",
    "Wants",
    "preset",
    "register",
    "table",
    "wanted_by",
]
