"""The inference service of Isthmus: embeds images, sounds and texts into one space, searches and labels them."""

__version__ = "0.1.0"
