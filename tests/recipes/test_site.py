"""The documentation site: its reference describes every key of every command, and all of its links lead somewhere."""

import os
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from jsonschema import Draft202012Validator

from litgpt.recipe.choices import CLASS_PATHS, import_class
from litgpt.recipe.commands import COMMANDS
from litgpt.recipe.help_text import Entry, get_summary, list_entries, list_groups
from litgpt.recipe.keys import REQUIRED, find_group, list_settings
from litgpt.recipe.schema import build_schema
from tutorials.site.reference import name_command_page, write_command_page, write_key_example

ROOT = Path(__file__).parents[2]
TUTORIALS = ROOT / "tutorials"


def list_command_entries(recipe: type) -> list[Entry]:
    return [entry for entries in list_groups(recipe).values() for entry in entries]


def test_every_key_has_a_sentence() -> None:
    recipes = {command.import_recipe() for command in COMMANDS.values()}
    entries = [(recipe.__name__, entry) for recipe in recipes for entry in list_command_entries(recipe)]
    for base, paths in CLASS_PATHS.items():
        for path in set(paths.values()):
            cls = import_class(path, base.__name__)
            assert get_summary(cls), path
            entries += [(path, entry) for entry in list_entries(cls, "")]
    assert len(entries) > 1000
    assert [(owner, entry.key) for owner, entry in entries if len(entry.text.split()) < 2] == []


@pytest.mark.parametrize("name", [pytest.param("pretrain", marks=pytest.mark.slow), "align", "serve", "plan"])
def test_every_example_is_valid(name: str) -> None:
    recipe = COMMANDS[name].import_recipe()
    required = [key for key, (_, default) in list_settings(recipe).items() if default is REQUIRED]
    validator = Draft202012Validator({**build_schema(recipe), "required": []})
    assert set(required) <= set(COMMANDS[name].positionals)
    wrong = {}
    for entry in list_command_entries(recipe):
        if not find_group(entry.hint):
            text = write_key_example(recipe, entry)
            if not validator.is_valid(yaml.safe_load(text)):
                wrong[entry.key] = text
    assert wrong == {}


def test_the_page_of_a_command_has_its_keys_and_their_limits() -> None:
    page = write_command_page("pretrain")
    for entry in list_command_entries(COMMANDS["pretrain"].import_recipe()):
        assert f"### `{entry.key}` {{ #{entry.key} }}" in page
    assert "a number from 0 to 1" in page
    assert "[litgpt align](align.md)" in write_command_page("dpo")
    assert len({name_command_page(name) for name in COMMANDS}) == len(COMMANDS)


def test_every_tutorial_is_in_the_navigation() -> None:
    settings = (TUTORIALS / "site" / "mkdocs.yml").read_text(encoding="utf-8")
    listed = [path for section in yaml.safe_load(settings)["nav"] for paths in section.values() for path in paths]
    assert {page.relative_to(TUTORIALS).as_posix() for page in TUTORIALS.rglob("*.md")} - set(listed) == set()


class Links(HTMLParser):
    """The anchors of a page, and what its links lead to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.targets: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, _tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            elif name in ("href", "src") and value:
                self.targets.append(value)


def list_dead_links(site: Path) -> Iterator[tuple[str, str]]:
    """Yield the links within a site that lead nowhere, each with its page."""
    pages = {page: Links(page) for page in sorted(site.rglob("*.html"))}
    for page, links in pages.items():
        for target in links.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc or page.name == "404.html":
                continue
            path = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            path = path / "index.html" if path.is_dir() else path
            is_anchor = not parts.fragment or path not in pages or unquote(parts.fragment) in pages[path].anchors
            if not path.is_file() or not is_anchor:
                yield str(page.relative_to(site)), target


@pytest.mark.slow
def test_the_site_is_built_and_its_links_lead_somewhere(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="needs the extra docs")
    config = TUTORIALS / "site" / "mkdocs.yml"
    command = ["-m", "mkdocs", "build", "--strict", "-q", "-f", str(config), "-d", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, ""), run.stderr
    site = tmp_path / "site"
    assert len(list(site.glob("reference/commands/*.html"))) == len(COMMANDS)
    assert list(list_dead_links(site)) == []
    listing = (site / "llms.txt").read_text(encoding="utf-8")
    assert {page.relative_to(site).as_posix() for page in site.rglob("*.md")} == {
        line.partition("](")[2].partition(")")[0] for line in listing.splitlines() if line.startswith("- [")
    }
    (site / "wrong.html").write_text('<a href="plan.html#no-such-heading"></a><a href="gone.html"></a>')
    assert list(list_dead_links(site)) == [("wrong.html", "plan.html#no-such-heading"), ("wrong.html", "gone.html")]
