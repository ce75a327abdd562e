"""What a measurement says, and to whom."""
