"""From a module, its loss and n units to the inner products of the units' gradients."""

from lightning_gradconf.gram.select import gradient_gram

__all__ = ["gradient_gram"]
