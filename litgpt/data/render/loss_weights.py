"""Weights of parts of an answer in the loss, found by patterns and keywords."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from litgpt.errors import UserError
from litgpt.recipe.bounds import Rate, check_numbers


@dataclass(frozen=True)
class WeightRule:
    """What the loss is multiplied by where an answer matches.

    Give `regex`, for what it matches; or `keyword`, for the word itself and for what follows it up to the next keyword.
    Where several rules match, their weights are multiplied.
    """

    weight: Rate
    """Of what matches."""
    regex: str | None = None
    """A regular expression; `.` matches line ends too."""
    keyword: str | None = None
    """A text to be found as it is."""
    following_weight: Rate = 1.0
    """With `keyword`: of what follows."""

    def __post_init__(self) -> None:
        check_numbers(self, "data.weights.")
        if (self.regex is None) == (self.keyword is None):
            raise UserError(f"data.weights: {self} has {'both' if self.regex else 'neither'}; give regex or keyword")
        if self.keyword == "":
            raise UserError("data.weights.keyword: '' will not do; give a text such as 'Action:'")
        try:
            re.compile(self.regex or "")
        except re.error as error:
            raise UserError(f"data.weights.regex: {self.regex!r} is no regular expression ({error})") from None


def split_by_weight(text: str, rules: Sequence[WeightRule]) -> list[tuple[int, int, float]]:
    """A text cut where the weight changes: (start, stop, weight) of each part, in order."""
    if not rules or not text:
        return [(0, len(text), 1.0)]
    weights = np.ones(len(text))
    for rule in rules:
        for found in re.finditer(rule.regex, text, re.DOTALL) if rule.regex is not None else ():
            weights[found.start() : found.end()] *= rule.weight
    by_keyword = {rule.keyword: rule for rule in rules if rule.keyword is not None}
    longest_first = sorted(by_keyword, key=len, reverse=True)
    found_words = list(re.finditer("|".join(map(re.escape, longest_first)), text)) if by_keyword else []
    nexts = [*(found.start() for found in found_words[1:]), len(text)]
    for found, following in zip(found_words, nexts, strict=True) if found_words else ():
        weights[found.start() : found.end()] *= by_keyword[found[0]].weight
        weights[found.end() : following] *= by_keyword[found[0]].following_weight
    cuts = [0, *(np.flatnonzero(np.diff(weights)) + 1).tolist(), len(text)]
    return [(low, high, float(weights[low])) for low, high in itertools.pairwise(cuts)]
