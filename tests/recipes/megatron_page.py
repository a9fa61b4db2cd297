"""The tables of `tutorials/from_megatron.md`, which `python -m tests.recipes.megatron_page` writes."""

from itertools import groupby
from pathlib import Path

from litgpt.recipe.option_table import Option, load_options

PAGE = Path(__file__).parents[2] / "tutorials" / "from_megatron.md"
MARK = "<!-- The tables below are generated: python -m tests.recipes.megatron_page -->\n"


def format_row(option: Option) -> str:
    """A row of a table: names, state, and the key with its values, conditions and notes, or the reason."""
    names = ", ".join(f"`{name}`" for name in (option.name, *option.aliases))
    values = ", ".join(f"{value}: {setting}" for value, setting in option.values.items() if value != setting)
    conditions = " and ".join(f"{name.removesuffix('_class')}: {values}" for name, values in option.when.items())
    parts = [
        f"`{option.key}`" if option.key else "",
        f"({values})" if values else "",
        f"if {conditions}" if conditions else "",
    ]
    notes = "; ".join(filter(None, (" ".join(filter(None, parts)), option.note, option.reason)))
    return f"| {names} | {option.state} | {notes.replace('<', '&lt;')} |"


def format_tables() -> str:
    """The tables of all options, by sections."""
    sections = []
    for section, options in groupby(load_options(), key=lambda option: option.section):
        rows = "\n".join(map(format_row, options))
        sections.append(f"### {section}\n\n| option | state | key or reason |\n|---|---|---|\n{rows}\n")
    return "\n".join(sections)


def read_head() -> str:
    """The part of the page that is written by hand."""
    return PAGE.read_text(encoding="utf-8").partition(MARK)[0]


def format_page() -> str:
    """The page with its tables."""
    return f"{read_head()}{MARK}\n{format_tables()}"


if __name__ == "__main__":
    PAGE.write_text(format_page(), encoding="utf-8")
