"""A small text and a tokenizer of it, and a cache for each test."""

from pathlib import Path

import pytest

from isogrid.recipes.tokens import byte_level_tokenizer
from tests.recipes.tiny import prose


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With text.txt, and the tokenizer in `tokenizer`."""
    path = tmp_path_factory.mktemp("language")
    (path / "text.txt").write_text(prose(0, 6000), encoding="utf-8")
    byte_level_tokenizer((prose(1, 2000),), 320).save_pretrained(path / "tokenizer")
    return path


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
