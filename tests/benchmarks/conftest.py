from tests.training.conftest import tiny_root

__all__ = ["tiny_root"]
