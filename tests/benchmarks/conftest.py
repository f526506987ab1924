from tests.training.conftest import concept_root, tiny_root

__all__ = ["concept_root", "tiny_root"]
