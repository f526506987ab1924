"""The harness of benchmarks.beyond, and the rates that it counts, on answers that are known."""

import json

import numpy as np
import pytest

from benchmarks.beyond import __main__ as beyond
from benchmarks.beyond import audit_api, fdr


def test_all_that_need_no_data_are_tried_and_one_that_fails_does_not_hold(monkeypatch, capsys):
    monkeypatch.setattr(beyond, "NAMES", {"fdr": "fdr", "audit-api": "audit_api"})
    monkeypatch.setattr(audit_api, "measure", lambda options: {"holds": True, "bundle": str(options.bundle)})
    assert beyond.main(["audit-api", "--bundle", "there"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {
        "name": "audit-api",
        "holds": True,
        "bundle": "there",
    }
    beyond.main([])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"tried": 1, "hold": 1}
    monkeypatch.setattr(fdr, "measure", lambda options: 1 / 0)
    beyond.main(["--data", "."])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"tried": 2, "hold": 1}
    with pytest.raises(SystemExit):
        beyond.main(["fdr"])


def test_rates_and_the_threshold_with_hindsight():
    def answer(present, *similarities, right=()):
        marks = np.isin(range(len(similarities)), right)
        return fdr.Answer(present, np.array(similarities), [0.95 if s > 0.5 else 0.5 for s in similarities], marks, 2)

    absent = [answer(False, 0.1 * n, 0.0) for n in range(10)]
    found = [answer(True, 0.9, 0.4, right=(0, 1)), answer(True, 0.3, 0.2, right=(1,))]
    rates = fdr.compared(absent + found)
    assert rates["hindsight"] == {"absent": pytest.approx(0.1), "recall": 0.25, "concepts": 0.5}
    assert rates["fdr"] == {"absent": pytest.approx(0.4), "recall": 0.25, "concepts": 0.5}


def test_galleries_leave_out_what_is_absent():
    captions = [
        "a dog runs\nthe dog barks",
        "snow\nsnow falls",
        "a husky\nanimal",
        "a dog\ndog",
        "dog\ndog",
        "tent\ntent",
    ]
    known = fdr.Media(captions, np.array(["ketch", "ferry", "pizza"]), np.array(["Dog", "Rain", "Clock_tick"]), [])
    galleries = list(fdr.tasks(known, np.eye(12, dtype=np.float32)))
    assert [name for name, _, _ in galleries] == ["flickr8k", *3 * ("caltech101", "esc50", "mixed")]
    dogs = [asked for asked in galleries[0][2] if asked.word == "dog"]
    assert dogs[0].right[0].tolist() == [True, False, False, True, True, False]
    assert dogs[1].right is None and dogs[1].there[0].tolist() == [False, True, False, False, False, True]
    for name, gallery, every in galleries:
        for asked in every:
            assert len(asked.there) == len(gallery)
            if asked.right is not None and name != "flickr8k":
                assert any((right & there).any() for right, there in zip(asked.right, asked.there, strict=True))
