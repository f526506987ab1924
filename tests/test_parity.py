"""What training computes is what the service answers: a bundle is trained, served and compared, item by item."""

import json
from pathlib import Path

import pytest

from benchmarks.parity import compare, main, test_items
from service.settings import Settings
from tests import tiny_bundle
from tests.conftest import serving
from tests.training import tiny
from training.__main__ import main as training
from training.recipe import load_recipe

# The exporter of torch itself uses what a newer torch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

ALL = 1_000
