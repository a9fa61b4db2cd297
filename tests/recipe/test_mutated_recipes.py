"""Random recipes with one error: each gives one line that names the key, and no traceback."""

import copy
import random
from collections.abc import Iterator
from typing import Any

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


def mutate(rng: random.Random, tree: dict[str, Any]) -> tuple[str, tuple[str, ...], bool]:
    """Change one key of a recipe; return the kind of change, its path, and whether it must be refused."""
    kind = rng.choice(["typo", "type", "missing", "null", "absurd"])
    place = rng.choice(list(places(tree)))
    group, key = group_at(tree, place), place[-1]
    if kind == "typo":
        wrong = misspell(rng, key)
        group[wrong] = group.pop(key)
        return kind, (*place[:-1], wrong), wrong != key and len(wrong) > 0
    if kind == "missing":
        del group[key]
        return kind, place, place in [("model_name",), ("data", "init_args", "path"), ("data", "init_args")]
    if kind == "null":
        group[key] = None
        return kind, place, place in [("model_name",), ("data", "init_args", "path"), ("data", "init_args")]
    number = type(group[key]) in (int, float)
    group[key] = rng.choice(ABSURD if kind == "absurd" and number else WRONG)
    return kind, place, kind == "absurd" and number and place[:2] != ("data", "init_args")


def campaign(count: int, seed: int, litgpt, user_module: str, folder) -> None:
    """Mutate `count` recipes and check the outcome of each."""
    rng, path = random.Random(seed), folder / "mutated.yaml"
    schema = Draft202012Validator(build_schema(Pretrain))
    whole = whole_recipe(user_module)
    assert litgpt("pretrain", "--config", save(path, whole)).code == 0
    assert schema.is_valid(whole)
    refused = 0
    for number in range(count):
        tree = copy.deepcopy(whole)
        kind, place, must_fail = mutate(rng, tree)
        outcome = litgpt("pretrain", "--config", save(path, tree))
        value = group_at(tree, place).get(place[-1])
        story = f"{number}: {kind} at {'.'.join(place)}: {value!r}\n{outcome.err}"
        if outcome.code == 0:
            assert not must_fail and (kind == "null" or schema.is_valid(tree)), story
            path.write_text(dump_recipe(outcome.recipe))
            assert dump_recipe(litgpt("pretrain", "--config", str(path)).recipe) == dump_recipe(outcome.recipe), story
            continue
        refused += 1
        assert outcome.code == 2 and outcome.recipe is None and "Traceback" not in outcome.err, story
        assert outcome.err.count("\n") == 1 and outcome.err.startswith("litgpt: error: "), story
        named = ".".join(part for part in place if part not in ("init_args", "class_path"))
        assert named in outcome.err or place[-1] in outcome.err, story
    assert refused > count // 2


def save(path, tree: dict[str, Any]) -> str:
    """Write a recipe as YAML; return the path of the file."""
    path.write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
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
    campaign(60, 1, litgpt, user_module, tmp_path)


def test_scrambled_recipes(litgpt, user_module, tmp_path):
    scramble(25, 2, litgpt, user_module, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(10))
def test_five_thousand_mutated_recipes(litgpt, user_module, tmp_path, seed):
    campaign(500, 10 + seed, litgpt, user_module, tmp_path)
    scramble(100, 20 + seed, litgpt, user_module, tmp_path)
