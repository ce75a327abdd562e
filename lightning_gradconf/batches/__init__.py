"""What a unit is, and where units come from."""
