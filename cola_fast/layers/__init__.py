"""Modules of the model: a linear that carries a link, which ones get one, and PEFT's layers made faster."""
