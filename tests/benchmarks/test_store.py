"""The command runs from end to end on a few vectors. How fast anything is, is not a test's business."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import store
from benchmarks.clustered import Clustered
from service.contract.bundle import read_bundle
from tests import tiny_bundle


def test_vectors_are_the_same_whatever_is_asked_for_with_them() -> None:
    clustered = Clustered(tiny_bundle.DIMENSIONS)
    few, more = clustered.vectors(0, 50), clustered.vectors(0, 20_050)
    assert np.array_equal(few, more[:50]) and len(more) == 20_050
    assert np.array_equal(more[20_000:], clustered.vectors(20_000, 50))


def test_the_truth_is_what_a_matrix_product_says() -> None:
    clustered = Clustered(tiny_bundle.DIMENSIONS)
    queries = clustered.vectors(10**9, 5)
    [(_, vectors, metadata)] = clustered.chunks(0, 3_000)
    scores = queries @ vectors.T
    right = store.truth(clustered, 3_000, queries)
    assert np.array_equal(right[""], np.argsort(-scores, axis=1)[:, : store.COUNT])
    even = np.array([held["even"] for held in metadata])
    assert np.array_equal(right["50"], np.argsort(np.where(even, -scores, 9), axis=1)[:, : store.COUNT])


@pytest.mark.full
def test_the_last_line_is_every_figure(bundle_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = [
        "--bundle",
        str(bundle_dir),
        "--vectors",
        "21000",
        "--queries",
        "20",
        "--work",
        str(tmp_path),
        "--no-peer",
    ]
    assert store.main(command) == 0
    figures = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert figures["dimensions"] == read_bundle(bundle_dir).manifest.dimensions and figures["vectors"] == 21_000
    assert figures["hnsw.indexed"] > 18_000 and figures["hnsw.recall10"] >= 0.95
    for name in ("1", "10", "50"):
        assert figures[f"filtered.{name}.recall10"] >= 0.95
    for name in (
        "ingest_per_s",
        "start_s",
        "memory_ratio",
        "hnsw.p99_ms",
        "hnsw.over_bare_faiss",
        "hnsw.over_bare_faiss_busy",
    ):
        assert figures[name] > 0
    assert figures["peer.name"] is None


def test_a_peer_is_compared_at_equal_latency_and_at_equal_recall() -> None:
    curve = [["16", 0.80, 1.0], ["64", 0.95, 2.0], ["128", 0.99, 4.0]]
    assert store.compared(curve, own_recall=0.95, own_p50=1.5) == {"peer.recall10": 0.80, "peer.p50_ratio": 0.75}
    assert store.compared(curve, own_recall=0.999, own_p50=1.0) == {"peer.recall10": 0.80, "peer.p50_ratio": 0.25}
    assert store.compared(curve, own_recall=0.9, own_p50=0.5)["peer.recall10"] is None
