"""Hooks of MkDocs: add the generated pages, let links of the repository lead to pages, write llms.txt and Markdown."""

import posixpath
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Navigation
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from litgpt.recipe.commands import COMMANDS
from tutorials.site.reference import CHOICE_PAGES, build_reference_pages, name_command_page
from tutorials.site.tables import build_table_pages

ROOT_PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
LINK = re.compile(r"(!?\[([^\]]*)\])\((?!\w+:|#)([^)\s]+)\)")
OUTSIDE_LINK = re.compile(r"^\[[^\]]+\]: \.\./\.\./.*\n", flags=re.MULTILINE)
"""The definition of a link to a page of the repository on its host, such as a list of commits."""
RECIPE = re.compile(r"config_hub/(.+)\.yaml$")
SUMMARY_LENGTH = 200
pages: list[Page] = []
"""The pages of the current build, in the order of the navigation."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the reference to the navigation."""
    kinds = [{title: f"reference/{name}.md"} for name, title, _ in CHOICE_PAGES.values()]
    tables = [{name.title(): f"reference/{name}.md"} for name in ("models", "losses", "recipes")]
    commands = [{name: name_command_page(name)} for name in COMMANDS]
    assert config.nav is not None
    config.nav.insert(-1, {"Reference": [{"Commands": ["reference/index.md", *commands]}, *kinds, *tables]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, those of the repository's root, and the style sheet."""
    for name, path in ROOT_PAGES.items():
        files.append(File.generated(config, path, content=(ROOT / name).read_text(encoding="utf-8")))
    for path, text in {**build_reference_pages(), **build_table_pages()}.items():
        files.append(File.generated(config, path, content=text))
    style = Path(__file__).with_name("site.css")
    files.append(File.generated(config, style.name, abs_src_path=str(style)))
    return files


def map_link(target: str, page: str) -> str | None:
    """Map a link of a page in the repository to one in the site; None if the site has no such page.

    Args:
        page: the path of the page in the repository.
    """
    path, hash_sign, anchor = target.partition("#")
    in_repository = posixpath.normpath(posixpath.join(posixpath.dirname(page), path))
    if match := RECIPE.search(in_repository):
        return f"reference/recipes.md#{match[1].replace('/', '-')}"
    mapped = ROOT_PAGES.get(in_repository, in_repository.removeprefix("tutorials/"))
    is_page = in_repository in ROOT_PAGES or in_repository.startswith("tutorials/")
    return mapped + hash_sign + anchor if is_page and (ROOT / in_repository).is_file() else None


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Let the links of the repository lead to pages of the site, or be text, and rank keys first in a search."""
    path = page.file.src_uri
    if path.startswith("reference/"):
        page.meta["search"] = {"boost": 4}
        return markdown
    source = {site: name for name, site in ROOT_PAGES.items()}.get(path, f"tutorials/{path}")

    def replace_link(match: re.Match[str]) -> str:
        mapped = map_link(match[3], source)
        return f"{match[1]}({posixpath.relpath(mapped, posixpath.dirname(path) or '.')})" if mapped else match[2]

    return LINK.sub(replace_link, OUTSIDE_LINK.sub("", markdown))


def summarize(markdown: str) -> str:
    """Return the first sentence of the first paragraph of a page, without links."""
    body = re.sub(r"```.*?```", "", markdown, flags=re.DOTALL)
    paragraphs = [part for part in body.split("\n\n") if part.strip() and part.strip()[0] not in "#|!"]
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(paragraphs[0].split())) if paragraphs else ""
    return textwrap.shorten(re.split(r"(?<=[.:])\s", text)[0], SUMMARY_LENGTH, placeholder=" ...")


def on_nav(nav: Navigation, config: MkDocsConfig, files: Files) -> Navigation:  # noqa: ARG001
    """Keep the pages, in their order."""
    pages[:] = nav.pages
    return nav


def on_post_build(config: MkDocsConfig, **_: Any) -> None:
    """Write the Markdown of each page beside it, and llms.txt, which lists all of them."""
    folder = Path(config.site_dir)
    lines = [f"# {config.site_name}", "", f"> {config.site_description}", "", "## Pages", ""]
    for page in pages:
        markdown = page.markdown or ""
        (folder / page.file.src_uri).write_text(markdown, encoding="utf-8")
        lines.append(f"- [{page.title}]({page.file.src_uri}): {summarize(markdown)}")
    (folder / "llms.txt").write_text("\n".join([*lines, ""]), encoding="utf-8")
