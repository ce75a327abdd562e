"""Tiny models, each with one trap for an engine that computes gradients of single units.

A case is a function that returns a module, its loss and four batches of changing data, in float64 with 6 samples, so
that units of 1, 2 and 3 samples can be made of each.
"""

from gram.zoo import attention, derivatives, later, layers, losses, noise, parameters, reads, state
from gram.zoo.registry import MEASUREMENTS, SAMPLES, SINGLE, ZOO, Case, Model, cast, first, unit_of

__all__ = ["MEASUREMENTS", "SAMPLES", "SINGLE", "ZOO", "Case", "Model", "cast", "first", "unit_of"]
__all__ += ["attention", "derivatives", "later", "layers", "losses", "noise", "parameters", "reads", "state"]
