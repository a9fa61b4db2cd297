"""Placeholders of the model's name and author are replaced in all texts of a row; one without a text is a bad row."""

from typing import Any

import pytest

from litgpt.data.modules.conversations import Conversations
from litgpt.data.read.fields import BadRow
from litgpt.data.read.placeholders import check_names, fill_placeholders
from litgpt.errors import UserError

NAMES = {"model_name": ["小星", "Aster"], "model_author": ["Vega"]}
ROW: dict[str, Any] = {"query": "Who?", "response": "I am {{NAME}} of {{AUTHOR}}, {{NAME}}!", "tag": "en"}


def test_texts_are_chosen_by_the_language_of_the_row() -> None:
    filled = fill_placeholders(ROW, NAMES)
    assert filled == {"query": "Who?", "response": "I am Aster of Vega, Aster!"}
    assert fill_placeholders(ROW | {"tag": "zh"}, NAMES)["response"] == "I am 小星 of Vega, 小星!"
    assert fill_placeholders({"response": "{{NAME}}"}, NAMES) == {"response": "Aster"}
    one = fill_placeholders(ROW, NAMES | {"model_name": ["Rigel"]})
    assert one == ROW | {"response": "I am Rigel of Vega, Rigel!"}  # the tag chooses nothing, so it is kept


def test_texts_are_found_in_messages_and_other_rows_stay() -> None:
    messages = [{"role": "user", "content": "{{NAME}}?"}, {"role": "assistant", "content": [{"text": "by {{AUTHOR}}"}]}]
    filled = fill_placeholders({"messages": messages}, NAMES)
    assert filled["messages"][0]["content"] == "Aster?" and filled["messages"][1]["content"] == [{"text": "by Vega"}]
    other = {"query": "{{ NAME }}", "response": "{{name}} {NAME}", "tag": "zh"}
    assert fill_placeholders(other, NAMES) is other
    assert fill_placeholders("no row", NAMES) == "no row"


def test_a_placeholder_without_a_text_is_a_bad_row() -> None:
    with pytest.raises(BadRow, match=r"\{\{NAME\}\} without a text \(set data.model_name; \{\{NAME\}\} keeps it"):
        fill_placeholders(ROW, {"model_name": [], "model_author": ["Vega"]})
    assert fill_placeholders(ROW, NAMES | {"model_name": ["{{NAME}}"]})["response"].startswith("I am {{NAME}} of Vega")


@pytest.mark.parametrize("names", ["", [], ["a", "b", "c"], ["a", ""]])
def test_other_numbers_of_texts_are_refused(names: Any) -> None:
    with pytest.raises(UserError, match=r"data.model_name: .* is neither a text nor two; set one, or"):
        Conversations("rows.jsonl", model_name=names)
    assert check_names("model_name", None) == []
