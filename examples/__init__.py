"""Sample media that need no download, and the demonstration that uses them."""
