"""Random recipes with one error: each gives one line that names the key, and no traceback."""

import copy
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import yaml
from jsonschema import Draft202012Validator

from litgpt.recipe.optimizer import AdamW
from litgpt.recipe.pretrain import Pretrain, TokenizerArgs
from litgpt.recipe.schema import build_schema
from litgpt.recipe.to_yaml import dump_recipe, to_plain

WRONG = [{"a": 1}, [1, 2, 3], "wörd", 1.5, True, -7, 10**25, float("nan"), [], {}, [{}], "1.5.1", "# a"]
ABSURD = [10**19, -5, float("nan"), float("inf"), -float("inf"), 10**400]
FREE = ("model_config", "metadata")  # mappings whose keys are not checked by the recipe


def whole_recipe(user_module: str) -> dict[str, Any]:
    """Return a recipe that sets every key, with a data module of the user."""
    recipe = Pretrain("x", model_config={"n_layer": 2}, optimizer=AdamW(lr=1e-3), tokenizer=TokenizerArgs(), devices=1)
    return to_plain(recipe) | {
        "data": {"class_path": user_module, "init_args": {"path": "a", "copies": 2, "share": 0.5}}
    }


def places(tree: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of every key of a recipe."""
    for key, value in tree.items():
        yield (*above, key)
        if isinstance(value, dict) and key not in FREE:
            yield from places(value, (*above, key))


def group_at(tree: dict[str, Any], place: tuple[str, ...]) -> dict[str, Any]:
    """Return the mapping that contains the key at a path."""
    for key in place[:-1]:
        tree = tree[key]
    return tree


def misspell(rng: random.Random, word: str) -> str:
    """Drop, double or change one letter of a word."""
    at = rng.randrange(len(word))
    return rng.choice([word[:at] + word[at + 1 :], word[:at] + word[at] + word[at:], word[:at] + "x" + word[at + 1 :]])


class Change(NamedTuple):
    """A change of one key of a recipe: its kind, the path of the key, and whether the recipe must be refused."""

    kind: str
    place: tuple[str, ...]
    must_fail: bool
    value: Any = None
    """What the key is set to, or in a typo its new name."""

    def make(self, tree: dict[str, Any]) -> tuple[str, ...]:
        """Change a recipe; return the path of the key, which has another name after a typo."""
        group, key = group_at(tree, self.place), self.place[-1]
        if self.kind == "typo":
            group[self.value] = group.pop(key)
            return (*self.place[:-1], self.value)
        if self.kind == "missing":
            del group[key]
        else:
            group[key] = self.value
        return self.place


def draw_change(rng: random.Random, tree: dict[str, Any]) -> Change:
    """Draw a change of one key of a recipe."""
    kind = rng.choice(["typo", "type", "missing", "null", "absurd"])
    place = rng.choice(list(places(tree)))
    value = group_at(tree, place)[place[-1]]
    if kind == "typo":
        wrong = misspell(rng, place[-1])
        return Change(kind, place, wrong != place[-1] and len(wrong) > 0, wrong)
    if kind in ("missing", "null"):
        return Change(kind, place, place in [("model_name",), ("data", "init_args", "path"), ("data", "init_args")])
    number = kind == "absurd" and type(value) in (int, float)
    return Change("type", place, number and place[:2] != ("data", "init_args"), rng.choice(ABSURD if number else WRONG))


def draw_changes(count: int, seed: int, tree: dict[str, Any]) -> list[Change]:
    """Draw changes of a recipe, each of which is in the list once; about half of 5000 are drawn again."""
    rng = random.Random(seed)
    return list({repr(change): change for change in (draw_change(rng, tree) for _ in range(count))}.values())


def campaign(changes: list[Change], litgpt, user_module: str, folder) -> None:
    """Make each change in a recipe of its own and check the outcome."""
    path, schema = folder / "mutated.yaml", Draft202012Validator(build_schema(Pretrain))
    whole = whole_recipe(user_module)
    assert litgpt("pretrain", "--config", save(path, whole)).code == 0
    assert schema.is_valid(whole)
    refused = 0
    for number, change in enumerate(changes):
        tree = copy.deepcopy(whole)
        place = change.make(tree)
        outcome = litgpt("pretrain", "--config", save(path, tree))
        value = group_at(tree, place).get(place[-1])
        story = f"{number}: {change.kind} at {'.'.join(place)}: {value!r}\n{outcome.err}"
        if outcome.code == 0:
            assert not change.must_fail and (change.kind == "null" or schema.is_valid(tree)), story
            text = dump_recipe(outcome.recipe)
            path.write_text(text)
            assert dump_recipe(litgpt("pretrain", "--config", str(path)).recipe) == text, story
            continue
        refused += 1
        assert outcome.code == 2 and outcome.recipe is None and "Traceback" not in outcome.err, story
        assert outcome.err.count("\n") == 1 and outcome.err.startswith("litgpt: error: "), story
        named = ".".join(part for part in place if part not in ("init_args", "class_path"))
        assert named in outcome.err or place[-1] in outcome.err, story
    assert refused > len(changes) // 2


def save(path, tree: dict[str, Any]) -> str:
    """Write a recipe as YAML; return the path of the file."""
    path.write_text(yaml.dump(tree, Dumper=yaml.CSafeDumper, sort_keys=False, allow_unicode=True))
    return str(path)


def scramble(count: int, seed: int, litgpt, user_module: str, folder) -> None:
    """Change single bytes of the text of a recipe."""
    rng, path = random.Random(seed), folder / "scrambled.yaml"
    text = save(path, whole_recipe(user_module)) and path.read_bytes()
    for _ in range(count):
        at = rng.randrange(len(text))
        path.write_bytes(text[:at] + bytes([rng.choice(b"\n:#- {}[]'\"&*!|>%@`x0\xff\x00\t")]) + text[at + 1 :])
        outcome = litgpt("pretrain", "--config", str(path))
        if outcome.code:
            assert outcome.err.count("\n") == 1 and outcome.err.startswith("litgpt: error: "), path.read_bytes()


def test_mutated_recipes(litgpt, user_module, tmp_path):
    campaign(draw_changes(60, 1, whole_recipe(user_module)), litgpt, user_module, tmp_path)


def test_scrambled_recipes(litgpt, user_module, tmp_path):
    scramble(25, 2, litgpt, user_module, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", range(10))
def test_mutated_recipes_of_five_thousand_draws(litgpt, user_module, tmp_path, part):
    campaign(draw_changes(5000, 10, whole_recipe(user_module))[part::10], litgpt, user_module, tmp_path)
    scramble(100, 20 + part, litgpt, user_module, tmp_path)
