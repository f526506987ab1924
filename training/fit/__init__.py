"""How heads are trained: one loop."""
