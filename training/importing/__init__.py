"""`isthmus import`: models that are aligned already become bundles, without training."""
