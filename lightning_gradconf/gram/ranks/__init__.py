"""Grams of units that several processes have."""
