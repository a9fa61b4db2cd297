"""`litgpt report`: one HTML page about a run, readable without network."""

from litgpt.recipe.report import Report
from litgpt.train.report import write_report


def run(recipe: Report) -> None:
    """Write the page and print its path."""
    print(f"Report: {write_report(recipe.out_dir, recipe.output)}")
