"""A YAML file that remembers on which line it said what."""

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from isogrid.errors import RecipeError

Keys = tuple[str | int, ...]
"""Where a value is: keys of mappings and positions in lists."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number, as YAML 1.2 does."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


@dataclass
class Document:
    """What a YAML file says, and where it says it.

    Attributes:
        data: mappings, lists and scalars.
        name: of the file.
        places: where each key was given, as `recipe.yaml:12`.
    """

    data: dict[str, Any]
    name: str
    places: dict[Keys, str] = field(default_factory=dict)

    def place(self, keys: Keys) -> str:
        """Where a key was given; for one that is missing, the part that should have it."""
        return self.places.get(self.known(keys), f"{self.name}:1")

    def known(self, keys: Keys) -> Keys:
        """The longest beginning of the keys that the document has."""
        while keys and keys not in self.places:
            keys = keys[:-1]
        return keys

    def set(self, setting: str) -> None:
        r"""Apply `key.key=value`, the value in YAML.

        Raises:
            RecipeError: it is no such thing, or leads nowhere.

        >>> document = parse("training:\n  epochs: 3", "recipe.yaml")
        >>> document.set("training.lr=1e-3")
        >>> document.data
        {'training': {'epochs': 3, 'lr': 0.001}}
        """
        path, equals, text = setting.partition("=")
        keys: Keys = tuple(int(key) if key.isdigit() else key for key in path.split("."))
        if not equals or "" in keys:
            raise RecipeError(f"--set {setting}: expected key=value, such as --set training.seed=1.")
        try:
            value = _Loader(text).get_single_data()
        except (yaml.YAMLError, ValueError) as error:
            raise RecipeError(f"--set {setting}: the value is not YAML: {_problem(error)}.") from error
        holder: Any = self.data
        for depth, key in enumerate(keys):
            known = len(holder) if isinstance(holder, list) else 0
            if not (isinstance(holder, dict) if isinstance(key, str) else key < known):
                raise RecipeError(f"--set {setting}: the recipe has no {dotted(keys[: depth + 1])} that could be set.")
            if depth == len(keys) - 1:
                holder[key] = value
            else:
                if isinstance(key, str) and not isinstance(holder.get(key), dict | list):
                    # `model.arguments.channels=8` also where the recipe says `model: digits-cnn`.
                    holder[key] = {"name": holder[key]} if isinstance(holder.get(key), str) else {}
                holder = holder[key]
        self.places[keys] = f"--set {setting}"


def parse(text: str, name: str) -> Document:
    r"""YAML with the line of every key.

    Raises:
        RecipeError: the text is not YAML, says nothing, is no mapping, or gives a key twice.

    >>> parse("training:\n  epochs: 3", "recipe.yaml").place(("training", "epochs"))
    'recipe.yaml:2'
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
        data = _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise RecipeError(f"{name}:{mark.line + 1 if mark else 1}: not YAML: {_problem(error)}.") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecipeError(f"{name}: not YAML: {_problem(error)}.") from error
    if node is None or data is None:
        raise RecipeError(f"{name}: the recipe is empty. It needs at least model, data and training.")
    if not isinstance(data, dict):
        raise RecipeError(f"{name}:1: a recipe consists of keys with values, such as `model: digits-cnn`.")
    document = Document(data, name)
    _locate(node, (), document, set())
    return document


def dotted(keys: Keys) -> str:
    """Keys as people write them.

    >>> dotted(("rules", 0, "match"))
    'rules.0.match'
    """
    return ".".join(map(str, keys))


def _locate(node: yaml.Node, keys: Keys, document: Document, seen: set[yaml.Node]) -> None:
    """Write down the line of every key below a node; a node that aliases repeat is looked at once."""
    if node in seen:
        return
    seen.add(node)
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            path, line = (*keys, str(key_node.value)), key_node.start_mark.line + 1
            if key_node.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                raise RecipeError(f"{document.name}:{line}: {dotted(path)}: a key must be text.")
            if path in document.places:
                first = document.places[path].rpartition(":")[2]
                raise RecipeError(f"{document.name}:{line}: {dotted(path)}: given twice, first in line {first}.")
            document.places[path] = f"{document.name}:{line}"
            _locate(value_node, path, document, seen)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            document.places[(*keys, index)] = f"{document.name}:{item.start_mark.line + 1}"
            _locate(item, (*keys, index), document, seen)


def _problem(error: Exception) -> str:
    return str(getattr(error, "problem", None) or error).rstrip(".")
