from benchmarks.path_of_an_image import followed


def test_an_image_goes_no_further_round_than_it_did() -> None:
    passage, store_reads = followed()
    through = [code for code, handed_on in passage.functions.items() if handed_on]
    names = {code.co_qualname for code in through}
    assert {"read", "Embedder.embed", "see_image", "Tower.run", "JSON.render"} <= names, "it is followed to its end"
    assert len(through) <= 30 and len({code.co_filename for code in through}) <= 13
    assert len(passage.types) <= 10, list(passage.types)
    assert store_reads == 1
