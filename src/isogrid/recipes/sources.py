"""From the names in a recipe to Python objects."""

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from isogrid.errors import RecipeError
from isogrid.recipes.data import Data
from isogrid.recipes.digits import DigitsNet, digits
from isogrid.recipes.language import built_in_model, built_in_text, causal_model, text
from isogrid.recipes.schema import Source
from isogrid.recipes.words import did_you_mean

Made = TypeVar("Made")

MODELS: dict[str, Callable[..., nn.Module]] = {
    "digits-cnn": DigitsNet,
    "language-model": built_in_model,
    "huggingface": causal_model,
}
"""Built-in models by name."""

AT_RANDOM = frozenset({"digits-cnn", "language-model"})
"""Those that know nothing before they are trained."""

DATA: dict[str, Callable[..., Data]] = {"digits": digits, "english": built_in_text, "text": text}
"""Built-in data by name."""


def make_model(source: Source) -> nn.Module:
    """The float model that a recipe names; raises RecipeError where that is none.

    >>> make_model(Source(name="digits-cnn", arguments={"channels": 4})).classifier
    Linear(in_features=8, out_features=10, bias=True)
    """
    return _made("model", source, MODELS, nn.Module)


def make_data(source: Source) -> Data:
    """The data that a recipe names; raises RecipeError where that is none."""
    return _made("data", source, DATA, Data)


def _made(what: str, source: Source, built_in: dict[str, Callable[..., Made]], kind: type[Made]) -> Made:
    function: Callable[..., Any] = built_in.get(source.name) or _imported(what, source.name, list(built_in))
    try:
        inspect.signature(function).bind(**source.arguments)
    except TypeError as error:
        raise RecipeError(f"{what}: {source.name} does not take these arguments: {error}.") from error
    except ValueError:  # a callable that does not tell its signature
        pass
    made = function(**source.arguments)
    if not isinstance(made, kind):
        raise RecipeError(
            f"{what}: {source.name} returns a {type(made).__name__}. "
            f"It must return a {kind.__module__}.{kind.__name__}."
        )
    return made


def _imported(what: str, name: str, built_in: list[str]) -> Callable[..., Any]:
    module_name, colon, attribute = name.partition(":")
    if not colon:
        raise RecipeError(
            f"{what}: unknown name {name!r}.{did_you_mean(name, built_in)} "
            f"Built in: {', '.join(built_in)}. Your own is named package.module:callable."
        )
    _see_working_folder()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise RecipeError(f"{what}: importing {module_name} failed: {error}.") from error
        raise RecipeError(
            f"{what}: there is no module {module_name!r}. It must be installed, or lie in the working folder."
        ) from error
    except (ImportError, SyntaxError, ValueError) as error:
        raise RecipeError(f"{what}: importing {module_name!r} failed: {error}.") from error
    found: Any = module
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise RecipeError(
            f"{what}: {module_name} has no callable {attribute!r}.{did_you_mean(attribute, vars(module))}"
        )
    return found  # type: ignore[no-any-return]


def _see_working_folder() -> None:
    """Let imports find modules in the working folder, as `python -m` does."""
    folder = str(Path.cwd())
    if folder not in sys.path and "" not in sys.path:
        sys.path.insert(0, folder)
