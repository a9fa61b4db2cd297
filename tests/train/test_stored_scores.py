"""Scores are stored by the content of answers, whatever batch they are in, and damage is noticed."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from litgpt.data.stream.batch import IGNORE
from litgpt.errors import UserError
from litgpt.files import DamagedFileError
from litgpt.recipe.train import LossArgs
from litgpt.train.answer_scores import AnswerScorer
from litgpt.train.stored_scores import FILE, StoredScores, hash_answers
from tests.train.pairs import collate, draw_answers

ANSWERS = draw_answers(4, weighted=True)


def test_keys_depend_on_the_answer_alone() -> None:
    keys = hash_answers(collate(ANSWERS))
    assert hash_answers(collate(ANSWERS, packed=True)) == keys
    assert hash_answers(collate(ANSWERS[2:])) == keys[2:]
    assert len(set(keys)) == len(ANSWERS)


@pytest.mark.parametrize("change", ["ids", "labels", "weights"])
def test_keys_change_with_what_scores_depend_on(change: str) -> None:
    batch = collate(ANSWERS)
    row, column = (int(index[2]) for index in (batch.labels != IGNORE).nonzero(as_tuple=True))
    values = getattr(batch, change).clone()
    values[row, column] += 1
    before, after = hash_answers(batch), hash_answers(replace(batch, **{change: values}))
    assert [number for number, pair in enumerate(zip(before, after, strict=True)) if len(set(pair)) > 1] == [row]


def test_keys_depend_on_the_other_answer_only_if_its_length_counts() -> None:
    longer = [ANSWERS[0], replace(ANSWERS[0], ids=[*ANSWERS[0].ids, 7], weights=[*ANSWERS[0].weights, 1.0])]
    shorter = [ANSWERS[0], replace(ANSWERS[0], ids=ANSWERS[0].ids[:-1], weights=ANSWERS[0].weights[:-1])]
    for ld_alpha in (None, 0.5):
        scorer = AnswerScorer(LossArgs(), ld_alpha)
        keys = [hash_answers(scorer.measure(collate(pair)))[0] for pair in (longer, shorter)]
        assert (keys[0] == keys[1]) == (ld_alpha is None)


def test_scores_are_added_to_answers_with_labels() -> None:
    stored, batch = StoredScores(), collate(ANSWERS, packed=True)
    with pytest.raises(UserError, match="an answer that it did not have"):
        stored.add_to(batch)
    stored.values = {key: float(number) for number, key in enumerate(hash_answers(batch)) if key}
    values = stored.add_to(collate(ANSWERS[4:])).answer_values
    assert values is not None and values["reference"].tolist() == [4.0, 5.0, 6.0, 7.0]
    values = StoredScores().add_to(batch.without_targets()).answer_values
    assert values is not None and not values["reference"].any()


def test_scores_are_read_as_they_were_written(tmp_path: Path) -> None:
    stored, again = StoredScores(), StoredScores()
    draw = torch.Generator().manual_seed(1)
    for key in hash_answers(collate(ANSWERS)):
        stored.values[key or b""] = torch.randn((), generator=draw, dtype=torch.float64).item()
    again.read(tmp_path / "scores")
    assert again.values == {}
    stored.write(tmp_path / "scores")
    stored.write(tmp_path / "scores")
    again.read(tmp_path / "scores")
    assert again.values == stored.values
    path = tmp_path / "scores" / FILE
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(DamagedFileError, match=FILE):
        again.read(tmp_path / "scores")
