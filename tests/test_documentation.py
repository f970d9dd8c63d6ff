"""Every Python block in docs/ runs and prints what the page says it prints; every YAML block is a valid recipe."""

import doctest
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from isogrid.recipes.loading import load_recipe

DOCS = Path(__file__).parents[1] / "docs"
TEN_LINES = DOCS / "how-to" / "ten-lines.md"
BLOCK = re.compile(r"^```(python|pycon)\n(.*?)^```", re.MULTILINE | re.DOTALL)

RECIPE = re.compile(r"^```yaml\n(.*?)^```", re.MULTILINE | re.DOTALL)

Names = dict[str, Any]


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of each block of Python on a page."""
    return BLOCK.findall(page.read_text())


def run(page: Path, names: Names) -> Names:
    """Run a page from top to bottom in the current folder and return the names it leaves."""
    for language, block in blocks(page):
        names = (run_prompts if language == "pycon" else run_script)(block, page.name, names)
    return names


def run_prompts(block: str, name: str, names: Names) -> Names:
    test = doctest.DocTestParser().get_doctest(block, names, name, None, None)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    problems: list[str] = []
    runner.run(test, out=problems.append, clear_globs=False)
    assert not problems, "".join(problems)
    return test.globs


def run_script(block: str, name: str, names: Names) -> Names:
    script = Path(f"{name}.py")
    script.write_text(block)
    return runpy.run_path(str(script), init_globals=names)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("documentation")


@pytest.fixture(scope="module")
def after_ten_lines(folder: Path) -> Names:
    """What the page that others continue from leaves behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return run(TEN_LINES, {})


def pages() -> list[Path]:
    return [page for page in sorted(DOCS.rglob("*.md")) if blocks(page)]


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_page_runs(page: Path, folder: Path, after_ten_lines: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    if page != TEN_LINES:
        run(page, dict(after_ten_lines))


@pytest.mark.parametrize("recipe", RECIPE.findall((DOCS / "how-to" / "write-a-recipe.md").read_text()))
def test_recipe_is_valid(recipe: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    assert load_recipe(str(path)).training
