"""Recipes from files; every error names the file, the line and the key."""

import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from isogrid.errors import RecipeError
from isogrid.recipes.document import Document, Keys, dotted, parse
from isogrid.recipes.schema import Recipe
from isogrid.recipes.words import did_you_mean

KINDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "keys with values",
    "model_type": "keys with values",
    "model_attributes_type": "keys with values",
}
"""What pydantic's types of errors ask for, in words."""


def packaged_recipes() -> dict[str, str]:
    """The recipes that come with Isogrid: name to YAML text.

    >>> "digits-w4a8" in packaged_recipes()
    True
    """
    entries = [entry for entry in files("isogrid.recipes").iterdir() if entry.name.endswith(".yaml")]
    return {
        entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8")
        for entry in sorted(entries, key=lambda entry: entry.name)
    }


def load_recipe(source: str, settings: Sequence[str] = (), *, demo: bool = False) -> Recipe:
    """A recipe by its path, or by the name of one that comes with Isogrid.

    Args:
        source: path of a YAML file, or a packaged name such as `digits-w4a8`.
        settings: changes as `key.key=value`, the value in YAML.
        demo: take what the recipe has under `demo:`, such as a built-in model and text, in place of the keys above it.

    Returns:
        The recipe; its output folder is filled in.

    Raises:
        RecipeError: there is no such recipe, it is not YAML, or it says what a recipe cannot say; then the message
            has one line for each thing that is wrong.

    >>> recipe = load_recipe("digits-w4a8", ["training.seed=3"])
    >>> recipe.training.seed, recipe.output
    (3, 'runs/digits-w4a8')
    """
    text, name = _read(source)
    document = parse(text, name)
    _choose_demo(document, demo)
    for setting in settings:
        document.set(setting)
    recipe = validated(document)
    folder = f"runs/{Path(source).stem}{'-demo' * demo}"
    return recipe if recipe.output else recipe.model_copy(update={"output": folder})


def language_settings(model: str | None, text: str | None) -> list[str]:
    """The changes that name a language model of Hugging Face and its text in a recipe.

    >>> language_settings("gpt2", None)
    ['model.arguments.path="gpt2"', 'data.arguments.tokenizer="gpt2"']
    """
    keys = {"model.arguments.path": model, "data.arguments.tokenizer": model, "data.arguments.train": text}
    return [f"{key}={json.dumps(value)}" for key, value in keys.items() if value is not None]


def _choose_demo(document: Document, demo: bool) -> None:
    """Put the keys under `demo:` in the places of those above it, or leave them out."""
    changes = document.data.pop("demo", None)
    if not demo:
        return
    if not isinstance(changes, dict):
        packaged = [name for name, text in packaged_recipes().items() if "\ndemo:" in text]
        raise RecipeError(f"{document.name} has no demo. These have one: {', '.join(packaged)}.")
    for key, value in changes.items():
        document.data[key] = value
        moved = {keys[1:]: place for keys, place in document.places.items() if keys[:2] == ("demo", key)}
        document.places = {keys: place for keys, place in document.places.items() if keys[0] != key} | moved


def validated(document: Document) -> Recipe:
    """The recipe that a document describes; raises RecipeError with a line for each thing that is wrong."""
    try:
        return Recipe.model_validate(document.data)
    except ValidationError as error:
        order = {keys: index for index, keys in enumerate(document.places)}
        problems = sorted(
            error.errors(include_url=False), key=lambda details: order.get(document.known(details["loc"]), -1)
        )
        raise RecipeError("\n".join(dict.fromkeys(_line(document, details) for details in problems))) from error


def _read(source: str) -> tuple[str, str]:
    """The text of a recipe, and the name that errors call it by."""
    path, packaged = Path(source), packaged_recipes()
    if source in packaged and not path.is_file():
        return packaged[source], f"{source}.yaml"
    if not path.exists() and path.suffix not in (".yaml", ".yml") and path.name == source:
        raise RecipeError(
            f"There is no recipe {source!r}.{did_you_mean(source, packaged)} "
            f"Give the path of a YAML file, or one of: {', '.join(packaged)}."
        )
    try:
        return path.read_text(encoding="utf-8"), source
    except UnicodeDecodeError as error:
        raise RecipeError(f"{source}: not a text file in UTF-8.") from error
    except OSError as error:
        raise RecipeError(f"{source}: cannot be read: {error.strerror}.") from error


def _line(document: Document, details: ErrorDetails) -> str:
    """One error of pydantic in a line: where, which key, what is wrong, what to do."""
    keys: Keys = tuple(details["loc"])
    where = document.place(keys)
    named = where.startswith("--set") or not keys
    return f"{where}: {'' if named else dotted(keys) + ': '}{_problem(details, keys)}"


def _problem(details: ErrorDetails, keys: Keys) -> str:
    kind, value, context = details["type"], details["input"], details.get("ctx", {})
    if kind == "extra_forbidden":
        known = list(_part_at(keys[:-1]).model_fields)
        return "unknown key." + (did_you_mean(str(keys[-1]), known) or f" Known: {', '.join(known)}.")
    if kind == "missing":
        description = _part_at(keys[:-1]).model_fields[str(keys[-1])].description
        return f"missing. {description}" if description else "missing."
    if kind == "literal_error":
        choices = re.findall(r"'([^']+)'", context["expected"])
        return f"expected one of {', '.join(choices)}, not {_shown(value)}.{did_you_mean(str(value), choices)}"
    if kind == "value_error":
        return str(context["error"]).partition("\n")[0].rstrip(".?") + "."  # the rest repeats the documentation
    if kind in KINDS:
        return f"expected {KINDS[kind]}, not {_shown(value)}."
    message = details["msg"].replace("Input should", "must").replace("greater than or equal to", "at least")
    return f"{message.replace('less than or equal to', 'at most')}, not {_shown(value)}."


def _part_at(keys: Keys) -> type[BaseModel]:
    """The part of the schema that keys lead to."""
    part: type[BaseModel] = Recipe
    for key in keys:
        if isinstance(key, str):
            part = _part_in(part.model_fields[key].annotation)
    return part


def _part_in(annotation: Any) -> type[BaseModel]:
    """The part inside an annotation: Training in `Training | None`, RuleEntry in `list[RuleEntry]`."""
    choices = (annotation, *getattr(annotation, "__args__", ()))
    return next(choice for choice in choices if isinstance(choice, type) and issubclass(choice, BaseModel))


def _shown(value: Any) -> str:
    if isinstance(value, Mapping | list):
        return "keys with values" if isinstance(value, Mapping) else "a list"
    return "nothing" if value is None else repr(value)
