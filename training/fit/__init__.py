"""How heads and students are trained: one loop for alignment and distillation."""
