"""The loop that trains heads."""
