"""Loss weights for parts of answers, selected by patterns and keywords."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from litgpt.errors import UserError
from litgpt.recipe.bounds import Rate, check_numbers


@dataclass(frozen=True)
class WeightRule:
    """A factor of the loss where an answer matches.

    Set `regex` for the text that it matches; or `keyword` for the keyword and the text up to the next keyword.
    If several rules match, their weights are multiplied.
    """

    weight: Rate
    """Factor of the loss of the match."""
    regex: str | None = None
    """A regular expression; `.` also matches newlines."""
    keyword: str | None = None
    """A literal text."""
    following_weight: Rate = 1.0
    """With `keyword`: factor of the loss of the text after it."""

    def __post_init__(self) -> None:
        check_numbers(self, "data.weights.")
        if (self.regex is None) == (self.keyword is None):
            raise UserError(f"data.weights: {self} sets {'both' if self.regex else 'neither'}; set regex or keyword")
        if self.keyword == "":
            raise UserError("data.weights.keyword: '' is empty; use a text such as 'Action:'")
        try:
            re.compile(self.regex or "")
        except re.error as error:
            raise UserError(f"data.weights.regex: {self.regex!r} is not a regular expression ({error})") from None


def split_by_weight(text: str, rules: Sequence[WeightRule]) -> list[tuple[int, int, float]]:
    """Split a text where the weight changes: (start, stop, weight) of each part, in order."""
    if not rules or not text:
        return [(0, len(text), 1.0)]
    weights = np.ones(len(text))
    for rule in rules:
        for match in re.finditer(rule.regex, text, re.DOTALL) if rule.regex is not None else ():
            weights[match.start() : match.end()] *= rule.weight
    by_keyword = {rule.keyword: rule for rule in rules if rule.keyword is not None}
    longest_first = sorted(by_keyword, key=len, reverse=True)
    keywords = list(re.finditer("|".join(map(re.escape, longest_first)), text)) if by_keyword else []
    ends = [*(match.start() for match in keywords[1:]), len(text)]
    for match, end in zip(keywords, ends, strict=True) if keywords else ():
        weights[match.start() : match.end()] *= by_keyword[match[0]].weight
        weights[match.end() : end] *= by_keyword[match[0]].following_weight
    cuts = [0, *(np.flatnonzero(np.diff(weights)) + 1).tolist(), len(text)]
    return [(low, high, float(weights[low])) for low, high in itertools.pairwise(cuts)]
