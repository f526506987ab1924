"""Rows whose proof is an equality: tests of this repository, run anew. Their figure is how many passed."""

from benchmarks.family.lab import Lab, pytest_passes
from benchmarks.family.rows import Outcome, holds, row

_TESTS: dict[int, tuple[str, str, tuple[str, ...]]] = {
    5: (
        "Zipper",
        "adding a tower leaves the others' graphs and vectors the same bytes",
        (
            "training/test_extend.py::test_the_older_towers_are_the_same_bytes_and_give_the_same_vectors",
            "training/test_extend.py::test_a_store_filled_before_goes_on_and_takes_sounds",
        ),
    ),
    8: (
        "Uni-Perceiver",
        "/classify ranks as a search over its labels does",
        ("service/test_classify.py::test_the_ranking_is_that_of_a_search_over_the_label_vectors",),
    ),
    10: (
        "SkillNet",
        "only the towers that a request needs are loaded and run",
        (
            "service/test_models.py::test_only_the_towers_that_are_asked_for_are_loaded",
            "service/test_models.py::test_a_text_runs_no_image_session",
        ),
    ),
    20: (
        "UnIVAL",
        "the ends of a merge are the two heads themselves",
        (
            "training/test_merge.py::test_the_endpoints_are_the_files_themselves",
            "training/test_merge.py::test_between_them_every_weight_is_the_mean",
        ),
    ),
    31: (
        "Uni-Encoder",
        "the order of labels changes no score, and label vectors are encoded once",
        (
            "service/test_classify.py::test_the_order_of_the_labels_changes_no_score",
            "service/test_classify.py::test_label_vectors_are_remembered_by_labels_and_templates",
        ),
    ),
    42: (
        "IRRA",
        "similarity-distribution matching of unique positives is one-hot",
        (
            "training/test_objective.py::test_a_distribution_over_unique_positives_is_one_hot",
            "training/test_objective.py::test_each_contrast_is_its_definition",
        ),
    ),
    59: (
        "LOOK",
        "leave-one-out votes equal brute force, and find planted wrong labels",
        (
            "training/test_suspects.py::test_votes_are_those_of_brute_force",
            "training/test_suspects.py::test_planted_wrong_labels_are_found_and_nothing_else",
            "training/select/test_streaming.py::test_a_vote_equals_brute_force",
        ),
    ),
    67: (
        "Yi",
        "planted copies of test pairs leave training; near duplicates are those of exact measures",
        (
            "training/test_leaks.py::test_what_a_test_split_holds_leaves_training",
            "training/curate/test_curate.py::test_nothing_of_an_evaluation_set_gets_in",
            "training/test_duplicates.py::test_near_texts_are_those_of_the_exact_jaccard_similarity",
            "training/test_duplicates.py::test_near_images_are_all_those_within_the_distance",
        ),
    ),
    78: (
        "UL2",
        "the manifest's instructions go before queries and before what is stored",
        (
            "contract/test_tokens.py::test_an_instruction_goes_before_words_and_not_before_nothing",
            "service/test_fused.py::test_roles_reach_the_parts",
        ),
    ),
}


def _register(number: int, system: str, proof: str, names: tuple[str, ...]) -> None:
    @row(number, system, proof)
    def measure(lab: Lab) -> Outcome:
        passed, total = pytest_passes(*(f"tests/{name}" for name in names))
        return Outcome(f"{passed} of {total} tests pass", None, holds(passed == total > 0))


for _number, (_system, _proof, _names) in _TESTS.items():
    _register(_number, _system, _proof, _names)
