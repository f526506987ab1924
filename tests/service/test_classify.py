import asyncio
import tracemalloc
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from service.contract.abstention import Detector, auroc
from service.contract.errors import InputError
from service.contract.vectors import l2_normalise
from service.engine.caller import Caller
from service.engine.inputs import Media, Text
from service.errors import InputFailed, InvalidRequest, NotReady
from service.retrieval.adapters import STRENGTH
from service.retrieval.classify import _CHUNK, Classifier, _best, _prompts, stored_labels
from service.retrieval.search import Searcher
from service.runtime.logs import caller
from service.runtime.quotas import MemoryLimiter, Meter
from service.schemas.classify import ClassifyRequest, Label, LabelSetRequest, TaughtLabel
from service.schemas.search import SearchRequest
from service.store import Entry, SqliteStore
from tests.conftest import on_a_loop
from tests.service.fakes import FakeEmbedder, fake_manifest, vector_of
from tests.service.stores import in_sqlite

LABELS = ["dog", "cat", "rain", "sea", "clock", "bell"]
PHOTO = Media("image", b"photo")


def with_classifier(path, use, embedder=None):
    embedder = embedder or FakeEmbedder()
    return in_sqlite(path, lambda store: use(Classifier(embedder, store)), embedder.manifest)


def request(inputs, **options):
    return ClassifyRequest.model_construct(inputs=inputs, **options)


def classify(path, *inputs, embedder=None, **options):
    options = {"labels": LABELS, "top_k": 100} | options
    inputs = [Text(each) if isinstance(each, str) else each for each in inputs]
    return with_classifier(path, lambda classifier: classifier.classify(request(inputs, **options)), embedder)


def oracle(query, prompts, temperature=0.1):
    """{label: (score, similarity)} written out: the mean prompt vector, cosine, softmax."""
    similarities = {}
    for label, own in prompts.items():
        mean = np.mean([vector_of(prompt).astype(np.float64) for prompt in own], axis=0)
        similarities[label] = float(query.astype(np.float64) @ mean / np.linalg.norm(mean))
    total = sum(np.exp(each / temperature) for each in similarities.values())
    return {label: (float(np.exp(each / temperature) / total), each) for label, each in similarities.items()}


def test_scores_are_the_softmax_over_the_ensembled_prompts(tmp_path):
    text, image = classify(tmp_path, "a sentence", PHOTO)
    plain = oracle(vector_of("a sentence"), {label: [label] for label in LABELS})
    prompted = oracle(
        vector_of(b"photo"), {label: [f"a photo of a {label}", f"a picture of {label}"] for label in LABELS}
    )
    for result, wanted in ((text, plain), (image, prompted)):
        assert [each.label for each in result.labels] == sorted(LABELS, key=lambda label: -wanted[label][0])
        for each in result.labels:
            np.testing.assert_allclose((each.score, each.similarity), wanted[each.label], atol=1e-6)
        assert abs(sum(each.score for each in result.labels) - 1) < 1e-12
        assert result.abstained is False


def test_templates_of_the_request_and_prompts_of_a_label(tmp_path):
    labels = ["dog", Label(name="cat", prompts=["my {} cat", "a tabby"])]
    [result] = classify(tmp_path, PHOTO, labels=labels, templates=["one {}"])
    wanted = oracle(vector_of(b"photo"), {"dog": ["one dog"], "cat": ["my {} cat", "a tabby"]})
    assert {each.label: pytest.approx((each.score, each.similarity), abs=1e-6) for each in result.labels} == wanted


def test_the_cut_to_top_k_leaves_the_scores_as_they_are(tmp_path):
    [whole] = classify(tmp_path, "x")
    [cut] = classify(tmp_path, "x", top_k=2)
    assert cut.labels == whole.labels[:2]


def test_one_label_has_score_one(tmp_path):
    [result] = classify(tmp_path, "x", labels=["only"])
    assert [(each.label, each.score) for each in result.labels] == [("only", 1.0)]


def test_abstaining_keeps_the_labels(tmp_path):
    [plain] = classify(tmp_path, "x")
    best = plain.labels[0].score
    assert classify(tmp_path, "x", threshold=best)[0].abstained is False
    [unsure] = classify(tmp_path, "x", threshold=best + 1e-9)
    assert unsure.abstained is True and unsure.labels == plain.labels


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(LABELS), seed=st.integers(0, 9))
def test_the_order_of_the_labels_changes_no_score(tmp_path_factory, order, seed):
    path = tmp_path_factory.mktemp("store")
    [one] = classify(path, f"{seed}")
    [other] = classify(path, f"{seed}", labels=order)
    assert [each.label for each in one.labels] == [each.label for each in other.labels]
    for left, right in zip(one.labels, other.labels, strict=True):
        assert (left.score, left.similarity) == pytest.approx((right.score, right.similarity), rel=1e-12)


def test_equal_labels_keep_the_order_in_which_they_were_given(tmp_path):
    names = [f"{number % 7} {number}" for number in range(100)]
    [result] = classify(tmp_path, "x", labels=[Label(name=name, prompts=["the same"]) for name in names])
    assert [each.label for each in result.labels] == names


@on_a_loop
async def test_the_ranking_is_that_of_a_search_over_the_label_vectors(tmp_path):
    embedder = FakeEmbedder()
    store = SqliteStore.open(tmp_path, embedder.manifest)
    vectors = {
        label: l2_normalise(sum(vector_of(text.format(label)) for text in ("a photo of a {}", "a picture of {}")))
        for label in LABELS
    }
    await store.upsert([Entry("default", label, "text", {}, vector) for label, vector in vectors.items()])
    [hits] = await Searcher(embedder, store).search(SearchRequest.model_construct(query=PHOTO, top_k=100))
    [result] = await Classifier(embedder, store).classify(request([PHOTO], labels=LABELS, top_k=100))
    await store.close()
    assert [hit.item.id for hit in hits] == [each.label for each in result.labels]
    for hit, each in zip(hits, result.labels, strict=True):
        assert abs(hit.score - each.similarity) < 1e-6


def test_ten_thousand_labels_go_through_in_pieces_while_others_are_served(tmp_path):
    class Yielding(FakeEmbedder):
        async def embed(self, inputs, *arguments, **options):
            await asyncio.sleep(0)
            return await super().embed(inputs)

    embedder = Yielding()
    labels = [f"label {number}" for number in range(10_000)]

    async def use(classifier):
        turns = 0
        big = asyncio.create_task(classifier.classify(request([Text("x")], labels=labels, top_k=3)))
        while not big.done():
            await asyncio.sleep(0)
            turns += 1
        return await big, turns

    [result], turns = with_classifier(tmp_path, use, embedder)
    query = vector_of("x")
    best = sorted(labels, key=lambda label: -float(query @ vector_of(label)))[:3]
    assert [each.label for each in result.labels] == best
    assert max(embedder.asked) <= 256 and turns > len(embedder.asked) / 2


def test_label_vectors_are_remembered_by_labels_and_templates(tmp_path):
    embedder = FakeEmbedder()

    async def use(classifier):
        counts = []
        for options in ({}, {}, {"templates": ["some {}"]}, {"labels": LABELS[::-1]}, {}):
            before = sum(embedder.asked)
            await classifier.classify(request([Text("x")], **({"labels": LABELS} | options)))
            counts.append(sum(embedder.asked) - before)
        return counts

    assert with_classifier(tmp_path, use, embedder) == [7, 1, 7, 7, 1]


class Gated(FakeEmbedder):
    """Labels are encoded once it is let go."""

    def __init__(self):
        super().__init__()
        self.entered, self.goes, self.failing = asyncio.Event(), asyncio.Event(), False

    async def embed(self, inputs, *arguments, **options):
        results = await super().embed(inputs)
        if len(inputs) > 1:
            self.entered.set()
            await self.goes.wait()
            if self.failing:
                raise NotReady("closed")
        return results


def test_new_labels_that_many_bring_at_once_are_encoded_once(tmp_path):
    embedder = Gated()

    async def use(classifier):
        same = request([Text("x")], labels=LABELS)
        first, *others = (asyncio.create_task(classifier.classify(same)) for _ in range(16))
        another = Caller(Meter(MemoryLimiter(), "another key", []))
        charged = asyncio.create_task(classifier.classify(same, another))
        await embedder.entered.wait()
        first.cancel()
        embedder.goes.set()
        found = await asyncio.gather(*others, charged)
        assert all(each == found[0] for each in found)
        assert [count for count in embedder.asked if count > 1] == [6, 6], "for each key that is charged"
        embedder.failing = True
        failures = await asyncio.gather(
            *(classifier.classify(request([Text("x")], labels=LABELS[:3])) for _ in range(4)), return_exceptions=True
        )
        assert all(isinstance(each, NotReady) for each in failures)
        embedder.failing = False
        assert await classifier.classify(request([Text("x")], labels=LABELS[:3]))
        assert [count for count in embedder.asked if count > 1] == [6, 6, 3, 3], "a failure is not kept"
        assert not classifier._encoding

    with_classifier(tmp_path, use, embedder)


def test_encoding_is_given_up_when_nobody_waits_for_it(tmp_path):
    embedder = Gated()

    async def use(classifier):
        labels = [str(number) for number in range(3 * _CHUNK)]
        waiting = [asyncio.create_task(classifier.classify(request([Text("x")], labels=labels))) for _ in range(2)]
        await embedder.entered.wait()
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        embedder.goes.set()
        fresh = await classifier.classify(request([Text("x")], labels=labels))
        assert len(fresh[0].labels) == 5
        assert [count for count in embedder.asked if count > 1] == [_CHUNK] * 4, "the first only chunk by chunk"
        assert not classifier._encoding

    with_classifier(tmp_path, use, embedder)


def test_few_large_sets_of_labels_are_encoded_at_once(tmp_path):
    """Two are, of two keys. Whatever waits, a small one is encoded all the same."""
    embedder = Gated()

    async def use(classifier):
        async def large(number):
            caller.set(f"key {number % 2}")
            labels = [f"{number} {label}" for label in range(_CHUNK)]
            await classifier.classify(request([Text("x")], labels=labels))

        waiting = [asyncio.create_task(large(number)) for number in range(6)]
        await embedder.entered.wait()
        small = asyncio.create_task(classifier.classify(request([Text("x")], labels=LABELS)))
        for _ in range(20):
            await asyncio.sleep(0)
        assert [count for count in embedder.asked if count > 1] == [_CHUNK, _CHUNK, len(LABELS)]
        embedder.goes.set()
        await asyncio.gather(*waiting, small)

    with_classifier(tmp_path, use, embedder)


def test_prompts_are_not_all_made_at_once():
    """10,000 labels and 100 templates of a thousand letters each are 11 MB, and their prompts 2 GB."""
    tracemalloc.start()
    made = _prompts(["l" * 1_000] * 10_000, ["t" * 998 + "{}"] * 100)
    assert sum(len(prompt) for _, prompt in islice(made, 1_000)) == 1_000 * 1_998
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


class FailsOn(FakeEmbedder):
    def __init__(self, text):
        super().__init__()
        self._text = text

    async def embed(self, inputs, *arguments, **options):
        results = await super().embed(inputs)
        return [
            InputError("too odd") if each == Text(self._text) else result
            for each, result in zip(inputs, results, strict=True)
        ]


def test_a_bad_input_or_label_is_named(tmp_path):
    with pytest.raises(InputFailed, match=r"^inputs\[1\]: too odd"):
        classify(tmp_path, "fine", "odd", embedder=FailsOn("odd"))
    with pytest.raises(InputFailed, match=r"^labels\[300\]: too odd"):
        classify(tmp_path, "x", labels=[f"{n}" for n in range(400)], embedder=FailsOn("300"))


class TestLabelSets:
    def test_is_encoded_once_and_survives_a_restart(self, tmp_path):
        labels = ["dog", Label(name="cat", prompts=["a tabby"])]
        with_classifier(tmp_path, lambda classifier: classifier.save_label_set("animals", labels, None))
        embedder = FakeEmbedder()
        stored = classify(tmp_path, PHOTO, "x", labels=None, label_set="animals", embedder=embedder)
        assert embedder.asked == [2]
        assert stored == classify(tmp_path, PHOTO, "x", labels=labels)

    def test_templates_of_the_set_and_of_the_request(self, tmp_path):
        with_classifier(tmp_path, lambda classifier: classifier.save_label_set("set", LABELS, ["the {}"]))
        stored = classify(tmp_path, PHOTO, labels=None, label_set="set")
        assert stored == classify(tmp_path, PHOTO, templates=["the {}"])
        other = classify(tmp_path, PHOTO, labels=None, label_set="set", templates=["no {}"])
        assert other == classify(tmp_path, PHOTO, templates=["no {}"])

    def test_new_templates_of_an_admitting_bundle_are_used(self, tmp_path):
        old = fake_manifest()
        new = fake_manifest("newer", admits=(old.space,), templates={"image": ["new {}"]})
        with_classifier(tmp_path, lambda classifier: classifier.save_label_set("set", LABELS, None), FakeEmbedder(old))
        stored = classify(tmp_path, PHOTO, labels=None, label_set="set", embedder=FakeEmbedder(new))
        assert stored == classify(tmp_path, PHOTO, templates=["new {}"], embedder=FakeEmbedder(new))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"labels": ["a", "b", "a"]}, "the label 'a' is there twice"),
        ({"labels": ["a", {"name": "a", "prompts": ["x"]}]}, "the label 'a' is there twice"),
        ({"labels": []}, "at least 1 item"),
        ({"labels": [""]}, "at least 1 character"),
        ({"labels": ["a\0"]}, "NUL"),
        ({"labels": [f"{n}" for n in range(10_001)]}, "at most 10000 items"),
        ({"labels": [{"name": "a", "prompts": []}]}, "at least 1 item"),
        ({}, "exactly one of: labels, label_set"),
        ({"labels": ["a"], "label_set": "b"}, "exactly one of: labels, label_set"),
        ({"labels": ["a"], "templates": ["no place"]}, r"must hold \{\} once"),
        ({"labels": ["a"], "templates": ["{} and {}"]}, r"must hold \{\} once"),
        ({"labels": ["a"], "threshold": "high"}, "valid number"),
        ({"labels": "dog"}, "valid list"),
        ({"labels": [7]}, r"labels\.0"),
        ({"labels": ["a"], "inputs": []}, "at least 1 item"),
        ({"labels": ["a"], "inputs": ["x"] * 257}, "at most 256 inputs"),
        ({"labels": ["a"], "templates": []}, "at least 1 item"),
        ({"labels": ["a"], "threshold": 1.5}, "less than or equal to 1"),
        ({"labels": ["a"], "top_k": 1001}, "top_k is at most 1000"),
        ({"labels": ["a"], "top_k": 1000, "inputs": ["x"] * 26}, "inputs × top_k"),
        ({"labels": ["a"], "abstain": 1.0}, "less than 1"),
        ({"labels": ["a"], "templates": {"Smell!": ["{}"]}}, "pattern"),
        ({"labels": ["a"], "grid": {"rows": 17, "columns": 1}}, "less than or equal to 16"),
        ({"labels": ["a"], "grid": {"rows": 16, "columns": 16}}, "inputs and their cells are at most 256"),
        ({"labels": [{"name": "a", "examples": ["x"]}]}, "examples"),
    ],
)
def test_requests_that_are_refused(body, message):
    with pytest.raises(ValidationError, match=message):
        ClassifyRequest.model_validate({"inputs": ["x"]} | body)


def test_label_sets_that_are_refused():
    with pytest.raises(ValidationError, match="the label 'a' is there twice"):
        LabelSetRequest.model_validate({"labels": ["a", "a"]})
    with pytest.raises(ValidationError, match="off_topic needs examples"):
        LabelSetRequest.model_validate({"labels": ["a", "b"], "off_topic": ["x", "y"]})
    many = [{"name": f"{n}", "examples": ["x"] * 100} for n in range(41)]
    with pytest.raises(ValidationError, match="at most 4096 in one label set"):
        LabelSetRequest.model_validate({"labels": many})


def picture(name):
    return Media("image", name.encode())


def taught(name, *examples):
    return TaughtLabel.model_construct(name=name, prompts=None, examples=[picture(word) for word in examples])


class TestExamples:
    LABELS = (taught("dog", "rex", "fido", "bello"), taught("cat", "tom"), "rain", Label(name="sea", prompts=["waves"]))

    def test_move_their_labels_and_no_others(self, tmp_path):
        plain = classify(tmp_path, PHOTO, picture("rex"), labels=self.LABELS)

        async def use(classifier):
            await classifier.save_label_set("set", self.LABELS, None)
            return await classifier.classify(request([PHOTO, picture("rex"), Text("rex")], label_set="set", top_k=9))

        photo, rex, word = with_classifier(tmp_path, use)
        similar = [{each.label: each.similarity for each in result.labels} for result in (plain[0], photo)]
        for name in ("rain", "sea"):
            assert similar[0][name] == similar[1][name]
        assert similar[0]["dog"] != similar[1]["dog"] and similar[0]["cat"] != similar[1]["cat"]
        places = [[each.label for each in result.labels].index("dog") for result in (plain[1], rex)]
        assert places[1] < places[0]
        # Pictures say nothing about words.
        assert word == classify(tmp_path, "rex", labels=self.LABELS, top_k=9)[0]

    def test_equal_the_vectors_written_out_under_any_templates(self, tmp_path):
        async def use(classifier):
            await classifier.save_label_set("set", self.LABELS, None)
            return await classifier.classify(request([PHOTO], label_set="set", templates=["my {}"], top_k=9))

        [result] = with_classifier(tmp_path, use)
        examples = {"dog": ["rex", "fido", "bello"], "cat": ["tom"]}
        means = {name: np.mean([vector_of(each.encode()) for each in own], axis=0) for name, own in examples.items()}
        middle = np.mean(list(means.values()), axis=0)
        for each in result.labels:
            vector = vector_of("waves" if each.label == "sea" else f"my {each.label}").astype(np.float64)
            if each.label in means:
                vector = l2_normalise(vector + STRENGTH * (means[each.label] - middle))
            assert each.similarity == pytest.approx(float(vector_of(b"photo") @ vector), abs=1e-6)

    def test_a_bad_one_is_named(self, tmp_path):
        labels = ["rain", taught("dog", "rex", "bad")]
        with pytest.raises(InputFailed, match=r"^labels\[1\].examples\[1\]: the file is corrupt"):
            with_classifier(tmp_path, lambda classifier: classifier.save_label_set("set", labels, None))
        with pytest.raises(InputFailed, match=r"^off_topic\[0\]: the file is corrupt"):
            with_classifier(
                tmp_path,
                lambda classifier: classifier.save_label_set("set", self.LABELS, None, off_topic=[picture("bad")]),
            )


class Near(FakeEmbedder):
    """Pictures called `dog …` and `cat …` lie near those words, others anywhere."""

    def _embed(self, value):
        found = super()._embed(value)
        if isinstance(value, Media) and value.data[:3] in (b"dog", b"cat"):
            return replace(found, vector=l2_normalise(vector_of(value.data[:3].decode()) + 0.3 * found.vector))
        return found


class TestAbstention:
    LABELS = tuple(taught(name, *(f"{name} {n}" for n in range(8))) for name in ("dog", "cat"))
    OFF = tuple(picture(f"other {n}") for n in range(16))

    def asked(self, path, manifest=None, off_topic=OFF, **options):
        async def use(classifier):
            await classifier.save_label_set("set", self.LABELS, ["{}"], off_topic)
            inputs = [picture(f"{kind} {n}") for kind in ("dog", "cat", "else", "thing") for n in range(100, 140)]
            return await classifier.classify(request(inputs, label_set="set", **options))

        return with_classifier(path, use, Near(manifest))

    def test_is_learned_from_examples_and_off_topic_inputs(self, tmp_path):
        results = self.asked(tmp_path, abstain=True)
        assert np.mean([each.abstained for each in results[:80]]) < 0.1
        assert np.mean([each.abstained for each in results[80:]]) > 0.7
        on, off = ([each.on_topic for each in half] for half in (results[:80], results[80:]))
        assert auroc(np.array(on), np.array(off)) > 0.95
        strict = self.asked(tmp_path, abstain=0.99)
        assert [each.abstained for each in strict] == [each.on_topic < 0.99 for each in strict]
        assert all(each.on_topic is None and not each.abstained for each in self.asked(tmp_path))

    def test_falls_back_on_the_bundle(self, tmp_path):
        with pytest.raises(InvalidRequest, match="which image inputs are off topic"):
            self.asked(tmp_path, off_topic=(), abstain=True)
        five = (1.0,) * 5
        sure = Detector(centre=(0.0,) * 5, scale=five, weights=(0.0,) * 5, bias=1.0, auroc=0.5)
        manifest = fake_manifest().model_copy(update={"abstention": {"image": sure}})
        results = self.asked(tmp_path, manifest, off_topic=(), abstain=True)
        assert [each.on_topic for each in results] == pytest.approx([1 / (1 + np.exp(-1))] * len(results))

    @settings(max_examples=10, deadline=None)
    @given(order=st.permutations(range(4)))
    def test_the_order_of_the_labels_changes_nothing(self, tmp_path_factory, order):
        labels = [*self.LABELS, "rain", "sea"]

        async def use(classifier):
            asked = [picture("dog 1"), picture("x")]
            await classifier.save_label_set("set", labels, None, self.OFF)
            one = await classifier.classify(request(asked, label_set="set", abstain=True))
            await classifier.save_label_set("set", [labels[place] for place in order], None, self.OFF)
            return one, await classifier.classify(request(asked, label_set="set", abstain=True))

        for one, other in zip(*with_classifier(tmp_path_factory.mktemp("store"), use, Near()), strict=True):
            assert [each.label for each in one.labels] == [each.label for each in other.labels]
            assert [each.score for each in one.labels] == pytest.approx([each.score for each in other.labels], rel=1e-5)
            assert one.on_topic == pytest.approx(other.on_topic, rel=1e-3)


def test_templates_by_modality(tmp_path):
    templates = {"image": ["one {}"], "text": ["the {}"]}
    text, image = classify(tmp_path, "x", PHOTO, templates=templates)
    assert [text] == classify(tmp_path, "x", templates=["the {}"])
    assert [image] == classify(tmp_path, PHOTO, templates=["one {}"])
    assert classify(tmp_path, "x", templates={"image": ["one {}"]}) == classify(tmp_path, "x")


def test_a_stored_set_is_read_again_only_when_it_has_changed(tmp_path):
    async def use(classifier):
        await classifier.save_label_set("set", ["old"], None)
        names = []
        for labels in (None, ["new"], None):
            if labels:
                await classifier.save_label_set("set", labels, None)
            [result] = await classifier.classify(request([Text("x")], label_set="set"))
            names.append(result.labels[0].label)
        held = classifier._sets["set"]
        await classifier.classify(request([Text("x")], label_set="set"))
        assert classifier._sets["set"] is held
        return names

    assert with_classifier(tmp_path, use) == ["old", "new", "new"]


@settings(deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.integers(1, 40))
def test_the_best_are_those_of_a_stable_sort(values, count):
    numbers = np.array(values, np.float64)
    assert _best(numbers, count).tolist() == np.argsort(-numbers, kind="stable")[:count].tolist()


def test_the_words_of_stored_labels():
    held = {"labels": ["a", {"name": "b", "prompts": ["x"]}, {"name": "c", "examples": 3}]}
    assert stored_labels(held) == ["a", Label(name="b", prompts=["x"]), Label(name="c")]
