import sqlite3

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import InvalidRequest
from service.store import Entry, KeywordSearch, keywords, parse
from service.store.keywords import match_expression
from tests.service.fakes import vector_of
from tests.service.stores import in_sqlite


def entry(id, text=None, collection="default", modality="text", **metadata):
    return Entry(collection, id, modality, metadata, vector_of(id), text=text)


ENTRIES = [
    entry("brown", "a brown dog runs", title="Night at the museum"),
    entry("two", "two dogs and a cat", title="Dog days"),
    entry("cat", "the cat sleeps", tags=["Straße", "dog"], year=2020),
    entry("other", "a dog", "elsewhere"),
    entry("picture", modality="image", title="the dog"),
]


def found(path, query, before=None, count=10, **options):
    async def use(store):
        await store.upsert(ENTRIES)
        if before:
            await before(store)
        hits = await store.keyword_search(KeywordSearch("default", query, count, **options))
        assert all(hit.item.vector is not None for hit in hits)
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        return [hit.item.id for hit in hits]

    return in_sqlite(path, use)


async def titles_and_tags(store):
    await store.set_keyword_fields("default", ["title", "tags"])


def test_words_of_text_items_are_found_without_being_asked_for(tmp_path):
    assert found(tmp_path, "dog") == ["brown"]
    assert found(tmp_path, "CATS cat") == ["cat", "two"]  # the shorter text first
    assert found(tmp_path, "cat dogs", every=True) == ["two"]
    assert found(tmp_path, '"brown dog"') == ["brown"] and found(tmp_path, '"dog brown"') == []
    assert found(tmp_path, "unheard") == [] and found(tmp_path, "?!") == []


def test_keyword_fields_cover_what_was_stored_before(tmp_path):
    assert set(found(tmp_path, "dog", titles_and_tags)) == {"brown", "two", "cat", "picture"}
    assert found(tmp_path, "dog", titles_and_tags, field="text") == ["brown"]
    assert set(found(tmp_path, "dog", titles_and_tags, field="title")) == {"two", "picture"}
    assert found(tmp_path, "strasse straße", titles_and_tags, field="tags") == ["cat"]
    assert found(tmp_path, "dog", titles_and_tags, modalities=["image"]) == ["picture"]
    assert found(tmp_path, "dog", titles_and_tags, filter=parse({"year": 2020})) == ["cat"]
    assert set(found(tmp_path, "dog", titles_and_tags, leave_out="picture")) == {"brown", "two", "cat"}
    assert len(found(tmp_path, "dog", titles_and_tags, count=2)) == 2


def test_and_what_is_stored_replaced_and_deleted_later(tmp_path):
    async def change(store):
        await titles_and_tags(store)
        await store.upsert([entry("new", title="a dog too"), entry("two", "nothing of the kind", title="none")])
        await store.delete("default", ["picture"])
        await store.delete_matching("default", parse({"year": 2020}))

    assert set(found(tmp_path, "dog dogs", change)) == {"new", "brown"}

    async def fewer(store):
        await store.set_keyword_fields("default", ["tags"])
        assert (await store.collection("default")).keywords == ["tags"]

    assert set(found(tmp_path, "dog", fewer)) == {"brown", "cat"}
    with pytest.raises(InvalidRequest, match=r"'title' is no keyword field .* it has text, tags"):
        found(tmp_path, "dog", field="title")


def test_a_dropped_collection_leaves_no_words_behind(tmp_path):
    async def use(store):
        await store.upsert(ENTRIES)
        await titles_and_tags(store)
        await store.drop_collection("default")

    in_sqlite(tmp_path, use)
    with sqlite3.connect(tmp_path / "store.sqlite3") as connection:
        assert connection.execute("SELECT content FROM keywords").fetchall() == [("a dog",)]
        held = connection.execute("SELECT rowid FROM keyword_index WHERE keyword_index MATCH 'dog'").fetchall()
        assert len(held) == 1
        connection.execute("INSERT INTO keyword_index (keyword_index) VALUES ('integrity-check')")
    connection.close()


@given(st.text(max_size=40) | st.text(alphabet="\"*^:()-+ANDORNEAR{}., \tdog'", max_size=40), st.booleans())
def test_any_words_make_a_valid_expression(query, every):
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE VIRTUAL TABLE words USING fts5 (content, tokenize = 'unicode61 remove_diacritics 2')")
    connection.execute("INSERT INTO words VALUES ('dog')")
    expression = match_expression(query, every=every)
    if expression is not None:
        connection.execute("SELECT * FROM words WHERE words MATCH ?", (expression,)).fetchall()
    connection.close()
    assert match_expression("dog") == '"dog"'


def test_the_words_are_looked_up_once_and_not_for_each_item(tmp_path):
    """With the rows outside and the word index inside, a query over 50,000 texts took 20 seconds instead of 0.02."""
    in_sqlite(tmp_path, lambda store: store.upsert(ENTRIES))
    connection = sqlite3.connect(tmp_path / "store.sqlite3")
    asked = []
    connection.set_trace_callback(asked.append)
    keywords.search(connection, 1, KeywordSearch("c", "dog", 5, "text", modalities=["text"]), np.arange(1, 4))
    connection.set_trace_callback(None)
    query = next(each for each in asked if each.startswith("WITH scored"))
    steps = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {query}")]
    order = [step for step in steps if step.startswith(("SCAN keyword", "SEARCH keyword"))]
    assert "VIRTUAL TABLE" in order[0] and order[1].startswith("SEARCH keywords USING INTEGER PRIMARY KEY"), steps
    connection.close()
