"""Isthmus trainer: joins frozen encoders into one space with small projectors, and exports it as a bundle."""
