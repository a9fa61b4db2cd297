"""`litgpt report`: one HTML page about a run, or about the differences of several, readable without network."""

from litgpt.recipe.report import Report
from litgpt.train.comparison import write_comparison
from litgpt.train.report import write_report


def run(recipe: Report) -> None:
    """Write the page and print its path."""
    if recipe.others:
        print(f"Comparison: {write_comparison([recipe.out_dir, *recipe.others], recipe.output)}")
    else:
        print(f"Report: {write_report(recipe.out_dir, recipe.output)}")
