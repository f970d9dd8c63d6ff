"""Every error of a recipe names the line, the key, and what was probably meant."""

from dataclasses import fields

import pytest

from isogrid.errors import RecipeError
from isogrid.planning.rules import Rule
from isogrid.recipes.document import parse
from isogrid.recipes.loading import load_recipe, packaged_recipes, validated
from isogrid.recipes.schema import RuleEntry, ScheduleEntry
from isogrid.training import Schedule

GOOD = """\
model: digits-cnn
data: digits
scheme: w4a8
rules:
  - match: classifier
    weight: int8/channel
training:
  epochs: 3
  lr: 1e-3
"""


def error(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        validated(parse(text, "recipe.yaml"))
    return str(caught.value)


def test_a_good_recipe_says_what_it_says() -> None:
    recipe = validated(parse(GOOD, "recipe.yaml"))
    assert recipe.model.name == "digits-cnn"
    assert recipe.training.lr == 1e-3
    assert recipe.rules[0].rule() == Rule(match="classifier", weight="int8/channel")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  epochs: 3", "  epocs: 3", "recipe.yaml:8: training.epocs: unknown key. Did you mean 'epochs'?"),
        ("scheme: w4a8", "shceme: w4a8", "recipe.yaml:3: shceme: unknown key. Did you mean 'scheme'?"),
        ("    weight:", "    wieght:", "recipe.yaml:6: rules.0.wieght: unknown key. Did you mean 'weight'?"),
        ("  lr: 1e-3", "  lr: many", "recipe.yaml:9: training.lr: expected a number, not 'many'."),
        ("  lr: 1e-3", "  lr: -1", "recipe.yaml:9: training.lr: must be greater than 0, not -1."),
        ("  epochs: 3", "  epochs: 0", "recipe.yaml:8: training.epochs: must be at least 1, not 0."),
        ("  epochs: 3", "  epochs: 2.5", "recipe.yaml:8: training.epochs: expected a whole number, not 2.5."),
        ("  epochs: 3", "  epochs: true", "recipe.yaml:8: training.epochs: expected a whole number, not True."),
        ("  lr: 1e-3", "  steps: 3", "recipe.yaml:7: training: give either epochs or steps."),
        (
            "  lr: 1e-3",
            "  optimizer: adamv",
            "recipe.yaml:9: training.optimizer: expected one of adamw, adamw8bit, adam, sgd, not 'adamv'. "
            "Did you mean 'adam'?",
        ),
        ("data: digits", "data: 3", "recipe.yaml:2: data: expected a name, or the keys name and arguments."),
        ("data: digits", "data: {nam: x}", "recipe.yaml:2: data.nam: unknown key. Did you mean 'name'?"),
        ("scheme: w4a8", "scheme: w4a9", "recipe.yaml:3: scheme: Unknown scheme 'w4a9'. Did you mean"),
        ("    weight: int8/channel", "    weight: int9/channel", "recipe.yaml:5: rules.0: "),
        ("    weight: int8/channel", "", "recipe.yaml:5: rules.0: The rule for 'classifier' asks for nothing."),
        ("data: digits", "3: 4", "recipe.yaml:2: 3: a key must be text."),
        ("data: digits\n", "", "recipe.yaml:1: data: missing."),
        ("  lr: 1e-3", "  epochs: 4", "recipe.yaml:9: training.epochs: given twice, first in line 8."),
        ("rules:\n", "rules: [\n", "recipe.yaml:5: not YAML: "),
        ("  epochs: 3", "\tepochs: 3", "recipe.yaml:8: not YAML: "),
    ],
)
def test_a_mistake_is_found_on_its_line(old: str, new: str, message: str) -> None:
    assert old in GOOD
    assert message in error(GOOD.replace(old, new)).splitlines() or error(GOOD.replace(old, new)).startswith(message)


def test_every_mistake_gets_a_line_in_the_order_of_the_file() -> None:
    text = GOOD.replace("data: digits", "data: 3").replace("epochs: 3", "epocs: 3").replace("1e-3", "no")
    assert [line.split(": ")[0] for line in error(text).splitlines()] == [
        "recipe.yaml:2", "recipe.yaml:8", "recipe.yaml:9",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["", "\n# only a comment\n", "---\n"])
def test_an_empty_file_is_called_empty(text: str) -> None:
    assert error(text).startswith("recipe.yaml: the recipe is empty.")


@pytest.mark.parametrize("text", ["hello", "- a\n- b", "3"])
def test_what_is_no_mapping_is_no_recipe(text: str) -> None:
    assert error(text).startswith("recipe.yaml:1: a recipe consists of keys with values")


def test_what_repeats_itself_without_end_is_an_error() -> None:
    assert "recipe.yaml:1: a: unknown key." in error("a: &a [*a]")


def test_a_checkpoint_and_float_training_exclude_each_other() -> None:
    text = GOOD + "checkpoint: weights.safetensors\nfloat_training: {epochs: 1}\n"
    assert "give checkpoint or float_training, not both" in error(text)


def test_a_file_that_is_not_there(tmp_path) -> None:
    with pytest.raises(RecipeError, match=r"missing\.yaml: cannot be read: No such file"):
        load_recipe(str(tmp_path / "missing.yaml"))


def test_a_file_that_is_not_text(tmp_path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not a text file in UTF-8"):
        load_recipe(str(path))


def test_a_name_that_is_nearly_right() -> None:
    with pytest.raises(RecipeError, match=r"There is no recipe 'digits-w4a9'\. Did you mean 'digits-w4a8'"):
        load_recipe("digits-w4a9")


@pytest.mark.parametrize("name", packaged_recipes())
def test_packaged_recipes_are_valid_and_say_what_they_are(name: str) -> None:
    assert load_recipe(name).output == f"runs/{name}"
    assert packaged_recipes()[name].startswith("# ")


def test_settings_change_a_recipe() -> None:
    recipe = load_recipe("digits-w4a8", ["training.lr=1e-2", "model.arguments.channels=4", "output=elsewhere"])
    assert recipe.training.lr == 1e-2
    assert recipe.model.name == "digits-cnn"
    assert recipe.model.arguments == {"channels": 4}
    assert recipe.output == "elsewhere"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("training.epocs=3", "--set training.epocs=3: unknown key. Did you mean 'epochs'?"),
        ("training.epochs=three", "--set training.epochs=three: expected a whole number, not 'three'."),
        ("training.epochs", "--set training.epochs: expected key=value"),
        ("=3", "--set =3: expected key=value"),
        ("rules.0.match=fc", "--set rules.0.match=fc: the recipe has no rules.0 that could be set."),
        ("training.lr=[", "--set training.lr=[: the value is not YAML"),
    ],
)
def test_a_setting_that_is_wrong_is_named(setting: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("digits-w4a8", [setting])
    assert str(caught.value).startswith(message)


def test_the_schema_has_the_keys_that_the_library_takes() -> None:
    assert set(RuleEntry.model_fields) == {field.name for field in fields(Rule)}
    schedule = Schedule.__init__.__annotations__
    assert {name: part.annotation for name, part in ScheduleEntry.model_fields.items()} == {
        name: kind for name, kind in schedule.items() if name not in ("model", "total_steps", "return")
    }
