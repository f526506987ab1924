from pathlib import Path

import pytest

from tests.training import tiny
from training.recipe import RecipeError, load_recipe, read_yaml

RECIPES = sorted((Path(__file__).parents[2] / "training/recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", [p for p in RECIPES if not p.name.startswith("distill-")], ids=lambda p: p.stem)
def test_every_shipped_recipe_is_valid(path: Path) -> None:
    assert load_recipe(path).name == path.stem


def test_overrides_beat_the_environment_and_it_beats_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny.write_recipe(tmp_path / "r.yaml", tiny.recipe_values(Path("/file")))
    monkeypatch.setenv("ISTHMUS_DATA", "/environment")
    assert load_recipe(path).data.root == Path("/environment")
    assert load_recipe(path, ["data.root=/flag", "train.steps=7"]).data.root == Path("/flag")
    assert load_recipe(path, ["train.steps=7"]).train.steps == 7


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=0", "train.steps"),
        ("train.stepz=5", "train.stepz"),
        ("encoders.image.hub=a/b", "exactly one of hub"),
        ("templates.audio=[]", "templates.audio is empty"),
        ("pairs.tones.modality=video", "pairs.tones has video media"),
        ("name=7", "name"),
        ("projector.matryoshka=[8,4]", "matryoshka must rise"),
        ("projector.matryoshka=[16]", "between 1 and 15"),
        ("train.objective.kind=softmax", "train.objective.kind"),
        ("train.objective={kind: sdm, repeats: mask}", "repeats cannot be mask"),
        ("projector.kind=glu", "projector.kind: glu is gone, because it reached R@1 20.06"),
        ("projector.kind=attention", "projector.kind: attention is gone, because pooling by learned queries"),
        ("train.objective.kind=sigmoid", "train.objective.kind: sigmoid is gone, because it reached R@1 15.9"),
        ("train.objective.bias=0.0", "train.objective.bias is gone"),
        ("train.objective.chunk=0", "train.objective.chunk"),
        ("train.regularise.uniform=1.0", "train.regularise.uniform"),
        ("train.regularise.fusemix=1.0", "train.regularise.fusemix is gone, because it lowered R@1"),
        ("train.regularise.structure=10", "train.regularise.structure is gone"),
        ("export.int8=static", "export.int8 is gone, because dynamic scales"),
        ("train.ema=0.9", "train.ema is gone, because an average of the weights gained nothing"),
        ("train.until={tone: 0.5}", "train.until.tone: it must name pairs"),
        ("train.until={tones: 0.5, pictures: 0.5}", "one must last"),
        ("encoders.image.layers=[3, 3]", "layers must be different"),
        ("licences=[{of: a, licence: CC-BY-NC-4.0, commercial: true}]", "licences.0: .*forbids commercial use"),
        ("licences=[{of: a}]", "licences.0.licence: Field required"),
        ("terms=[{of: a}]", "terms.0.terms: Field required"),
        ("train.seed=-1", "train.seed: Input should be greater than or equal to 0"),
        ("train.objective.captions=5", "batch_size 8 with objective.captions 5 leaves fewer than two media"),
        ("projector.dimensions=1", "projector.dimensions: Input should be greater than 1"),
        ("encoders=resnet", "encoders: Input should be a valid dictionary"),
        ("pairs=captions", "pairs: Input should be a valid dictionary"),
        ("train.steps=[1", "--set train.steps=.*is not YAML: put it into quotation marks"),
        ("train.learning_rate=.inf", "train.learning_rate: Input should be a finite number"),
        ("pairs.tones.group=(", "group is not a regular expression"),
        ("pairs.tones.group=abc", r"group: 'abc' has no group"),
        ("pairs.pictures.words=(r)(e)", "words may have one group"),
        ("pairs.tones.split_column=null", "one without the other splits nothing"),
        ("pairs.tones.splits={}", "one without the other splits nothing"),
        ("pairs.tones.splits={train: ['0', '2'], test: ['2']}", "splits: '2' is named more than once"),
        ("pairs.tones.validation_fraction=0.5", "whose validation split is not named, and it is"),
        ("templates.audio=['a sound']", "templates.audio: 'a sound' does not have {} once"),
        ("templates.audio=['{label}']", "does not have {} once"),
        ("templates.audio=['{} {x}']", "does not have {} once"),
        ("nonsense", "not key=value"),
        ("name.x=1", "name is not a mapping"),
    ],
)
def test_a_wrong_value_is_named(tmp_path: Path, override: str, message: str) -> None:
    path = tiny.write_recipe(tmp_path / "r.yaml", tiny.recipe_values(tmp_path))
    with pytest.raises(RecipeError, match=message):
        load_recipe(path, [override])


def test_a_source_that_lasts_must_teach_something(tmp_path: Path) -> None:
    path = tiny.write_recipe(tmp_path / "r.yaml", tiny.recipe_values(tmp_path))
    with pytest.raises(RecipeError, match="one must last"):
        load_recipe(path, ["train.until={tones: 0.5}", "pairs.pictures.weight=0"])


def test_unreadable_recipes_say_why(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "absent.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(RecipeError, match="not YAML"):
        load_recipe(tmp_path / "bad.yaml")
    (tmp_path / "twice.yaml").write_text("name: a\ntrain:\n  steps: 5\n  seed: 1\n  steps: 9\n")
    with pytest.raises(RecipeError, match=r"(?s)not YAML: steps is stated twice.*line 5"):
        load_recipe(tmp_path / "twice.yaml")
    (tmp_path / "latin.yaml").write_bytes("name: a\nnotes: rosé\n".encode("latin-1"))
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(tmp_path / "latin.yaml")
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(RecipeError, match="not a mapping"):
        load_recipe(tmp_path / "list.yaml")


def test_a_merged_mapping_may_replace_a_key(tmp_path: Path) -> None:
    (tmp_path / "merged.yaml").write_text("a: &a {x: 1, y: 2}\nb: &b\n  <<: *a\n  x: 3\nc:\n  <<: *b\n  x: 4\n")
    assert read_yaml(tmp_path / "merged.yaml")["c"] == {"x": 4, "y": 2}


def test_token_projectors_refuse_what_is_for_pooled_features(tmp_path: Path) -> None:
    values = tiny.recipe_values(tmp_path, projector={"kind": "token"})
    path = tiny.write_recipe(tmp_path / "r.yaml", values)
    with pytest.raises(RecipeError, match="pooling cannot be both"):
        load_recipe(path, ["encoders.text.pooling=both"])
