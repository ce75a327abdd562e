"""The engine that never forms the gradients of units."""
