"""A measurement inside a running Trainer."""
