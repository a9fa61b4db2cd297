"""Numbers in words, as `num2words` 0.5.14 spells them."""

import pytest

from litgpt.data.render.number_words import spell_number

WORDS = {
    0: "zero",
    13: "thirteen",
    20: "twenty",
    21: "twenty-one",
    64: "sixty-four",
    100: "one hundred",
    101: "one hundred and one",
    342: "three hundred and forty-two",
    1000: "one thousand",
    1001: "one thousand and one",
    1100: "one thousand, one hundred",
    12_345: "twelve thousand, three hundred and forty-five",
}


@pytest.mark.parametrize("number", WORDS)
def test_numbers_are_spelled(number: int) -> None:
    assert spell_number(number) == WORDS[number]
