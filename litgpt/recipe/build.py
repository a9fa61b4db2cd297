"""Build a validated recipe from YAML files and command-line flags; jsonargparse converts the types of the values."""

import re
from argparse import ArgumentError
from collections.abc import Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader, set_parsing_settings

from litgpt.errors import UserError
from litgpt.mappings import merge_mappings
from litgpt.recipe import keys
from litgpt.recipe.choices import (
    CLASS_PATHS,
    OPTIMIZER_PATHS,
    find_default_class,
    import_class,
    merge_choice,
    name_default_classes,
    normalize_custom_optimizer,
    parse_choice,
)
from litgpt.recipe.config_hub import find_config_file
from litgpt.recipe.data import DataModule
from litgpt.recipe.from_yaml import is_url, parse_text, read_yaml
from litgpt.recipe.optimizer import Optimizer
from litgpt.recipe.tuner import Tuner
from litgpt.recipe.unknown_key import KnownKeys, find_hint, unknown_key_error

KEY_ALIASES = {
    "checkpoint.async": "checkpoint.asynchronous",  # `async` is a keyword of Python
    "train.max_seq_length": "max_seq_length",  # the commands of data accept the name of a run, which messages have
}
"""Other names of keys; a command accepts one if it has the key and no key of that name."""
REPLACED_DEFAULTS = {"max_steps": "epochs", "max_tokens": "epochs", "lr_warmup_fraction": "lr_warmup_steps"}
"""Keys of train, and the one whose default is null if they are given."""
Tree = dict[str, Any]


def parse_scalar(text: str) -> Any:
    """Parse a scalar as jsonargparse does, except that `# Title` is a string and only `null` is None."""
    value = get_loader("yaml")(text)
    return text if value is None and text != "null" else value


set_loader("litgpt", parse_scalar, exceptions=(yaml.YAMLError,))
set_parsing_settings(subclasses_enabled=[Optimizer, Tuner])


class Flag(NamedTuple):
    """One `--key value` of the command line; `key` may be dotted."""

    key: str
    value: str


@cache
def build_parser(recipe: type) -> ArgumentParser:
    """Build the jsonargparse parser of a recipe, which converts its values."""
    parser = ArgumentParser(prog="litgpt", exit_on_error=False, parser_mode="litgpt")
    parser.add_class_arguments(recipe, as_positional=True)
    return parser


def merge_settings(recipe: type, old: Tree, new: Tree, *, trusted: bool, prefix: str = "") -> Tree:
    """Merge two mappings recursively, group by group; values of `new` take precedence.

    Args:
        trusted: whether `new` may name classes by any dotted path; False for a recipe read from a URL.
        prefix: the dotted key of the group, with a dot at its end, for error messages.
    """
    settings, merged = keys.list_settings(recipe), dict(old)
    for name, value in new.items():
        hint = settings[name][0] if name in settings else None
        group = keys.find_group(hint)
        if base := keys.find_choice_base(hint):
            merged[name] = merge_choice(merged.get(name), parse_choice(base, value, prefix + name, trusted))
        elif group and value is not None:
            if not isinstance(value, dict):
                raise keys.single_value_error(prefix + name, value, group)
            merged[name] = merge_settings(
                group, merged.get(name) or {}, value, trusted=trusted, prefix=f"{prefix}{name}."
            )
        else:
            merged = merge_mappings(merged, {name: value})
    return merged


def find_aliases(recipe: type) -> dict[str, str]:
    """Return the other names of keys that a recipe accepts, and those keys."""
    known = set(keys.list_keys(recipe))
    return {alias: key for alias, key in KEY_ALIASES.items() if key in known and alias not in known}


def rename_aliases(tree: Tree, aliases: dict[str, str]) -> Tree:
    """Replace the aliases in a mapping, which is changed, by their keys.

    Raises:
        UserError: if it has an alias and its key.
    """
    for alias, key in aliases.items():
        group, _, name = alias.partition(".")
        settings = tree.get(group)
        if not isinstance(settings, dict) or name not in settings:
            continue
        value = settings.pop(name)
        if not settings:
            tree.pop(group)
        key_group, _, key_name = key.rpartition(".")
        target = tree.setdefault(key_group, {}) if key_group else tree
        if key_name in target:
            raise UserError(f"{alias} and {key} are the same setting; set one of them")
        target[key_name] = value
    return tree


def count_levels(flag: Flag) -> int:
    """Return the depth of the key of a flag; `data.class_path` has that of `data`."""
    return sum(part not in ("class_path", "init_args") for part in flag.key.split("."))


def list_known_keys(recipe: type, tree: Tree) -> list[str]:
    """List every key of a recipe, including those of the classes that `tree` names or that are the default.

    Those of the default for `data` are hardly ever meant, and not listed.
    """
    known = []
    for name, (hint, _) in keys.list_settings(recipe).items():
        known.append(name)
        if group := keys.find_group(hint):
            known += keys.list_keys(group, f"{name}.")
        elif base := keys.find_choice_base(hint):
            choice, default = tree.get(name), None if base is DataModule else find_default_class(recipe, name)
            path = choice.get("class_path") if isinstance(choice, dict) else None
            path = path or CLASS_PATHS[base].get(default or "")
            known += keys.list_keys(cls, f"{name}.") if path and (cls := find_class(base, path)) else []
    return known


def find_class(base: type, path: str) -> type | None:
    """Return the class at a dotted path; None if there is none, or it is not a subclass of `base`."""
    try:
        cls = import_class(path, "")
    except UserError:
        return None
    return cls if issubclass(cls, base) else None


def flag_to_tree(recipe: type, flag: Flag, known: KnownKeys, *, trusted: bool = True) -> Tree:
    """Convert a flag to the mapping that is equivalent to it in YAML.

    Args:
        trusted: whether its value may be the path or the URL of a file that is read.
    """
    name, *subkeys = flag.key.split(".")
    hint, _ = keys.list_settings(recipe).get(name, (None, None))
    group, base = keys.find_group(hint), keys.find_choice_base(hint)
    has_keys = group or base or any(str(kind).startswith("dict") for kind in keys.list_types(hint))
    if hint is None or (subkeys and not has_keys):
        raise unknown_key_error([flag.key], known())
    named_group = group
    for subkey in subkeys:
        named_group = named_group and keys.find_group(keys.list_settings(named_group).get(subkey, (None,))[0])
    value: Any = flag.value
    if (has_keys and not subkeys) or named_group:
        value = parse_mapping_flag(flag, is_choice=base is not None) if trusted else parse_text(flag.value, flag.key)
    elif subkeys and not group:
        value = parse_text(flag.value, f"--{flag.key}")
    keys.check_utf8(value, flag.key)
    for subkey in reversed(subkeys):
        value = {subkey: value}
    return {name: value}


def parse_mapping_flag(flag: Flag, *, is_choice: bool) -> Any:
    """Parse the value of a flag that sets several keys: inline JSON, a YAML file, or a class name for a choice."""
    if flag.value.lstrip().startswith("{") or flag.value in ("null", ""):
        return parse_text(flag.value, f"--{flag.key}")
    is_file = flag.value.endswith((".yaml", ".yml", ".json"))
    if is_choice and (not is_file or holds_list(flag.value)):
        return flag.value
    if not is_file and not is_url(flag.value) and not Path(flag.value).exists():
        return flag.value  # which is refused with the names of the keys
    values = read_yaml(flag.value)
    keys.check_utf8(values, f"{flag.value}: {flag.key}")
    return values


def holds_list(path: str) -> bool:
    """Return whether a file begins as a list in JSON, so that it holds rows and not settings."""
    file = Path(path)
    return file.suffix == ".json" and file.is_file() and file.read_bytes()[:100].lstrip()[:1] == b"["


def normalize_settings(recipe: type, tree: Tree, known: KnownKeys, prefix: str = "") -> Tree:
    """Check the keys of a mapping and prepare its values for type conversion.

    Args:
        known: lists the keys that are suggested for an unknown key.
        prefix: the dotted key of the group, with a dot at its end.

    Raises:
        UserError: naming the first key that does not exist, is missing, or has an invalid value.
    """
    settings, normalized = keys.list_settings(recipe), {}
    for name, value in tree.items():
        if name not in settings:
            if keys.has_var_keywords(recipe):
                normalized[name] = value
                continue
            raise unknown_key_error([prefix + name for name in tree if name not in settings], known())
        hint, default = settings[name]
        check_other_names(recipe, name, value, prefix + name)
        normalized[name] = normalize_value(hint, value, prefix + name, default, known)
    for name, (_, default) in settings.items():
        if default is keys.REQUIRED and normalized.get(name) is None:
            raise UserError(f"{prefix}{name}: missing; set it with --{prefix}{name} or in the YAML file")
    return normalized


def check_other_names(group: type, name: str, value: Any, key: str) -> None:
    """Check that a value, or an item of a list, is not one that has another name here (`OTHER_NAMES` of the group).

    Raises:
        UserError: with the name that it has.
    """
    names = getattr(group, "OTHER_NAMES", {}).get(name, {})
    items = value if isinstance(value, list) else str(value).strip("[]").split(",") if names else []
    for shown in (str(item).strip().lower() for item in items):
        if shown in names:
            raise UserError(f"{key}: {shown} is not valid; did you mean {names[shown]}?")


def normalize_value(hint: Any, value: Any, key: str, default: Any, known: KnownKeys) -> Any:
    """Prepare one value of a mapping for type conversion."""
    optional = type(None) in keys.list_types(hint)
    if base := keys.find_choice_base(hint):
        return None if value is None else normalize_choice(base, value, key, known)
    if group := keys.find_group(hint):
        if value is None:
            return None if optional else {}
        if not isinstance(value, dict):
            raise keys.single_value_error(key, value, group)
        return normalize_settings(group, value, known, f"{key}.")
    if value is None and not optional and Any not in keys.list_types(hint) and default is not keys.REQUIRED:
        raise keys.wrong_value_error(key, value, hint, default)
    return keys.normalize_leaf(hint, value, key, default)


def normalize_choice(base: type, choice: Tree, key: str, known: KnownKeys) -> Tree:
    """Check that the class of a choice exists, and prepare its arguments for type conversion."""
    if base is Optimizer and choice["class_path"] not in OPTIMIZER_PATHS.values():
        return normalize_custom_optimizer(choice, key)
    cls = import_class(choice["class_path"], key)
    if not issubclass(cls, base):
        raise UserError(f"{key}: {choice['class_path']} is not a subclass of {base.__name__}")
    check_class_has_keys(base, cls, choice["init_args"], key, known)
    arguments = normalize_settings(cls, choice["init_args"], known, f"{key}.")
    if base is not DataModule:  # jsonargparse would keep the settings of the default class for another one
        arguments = {name: default for name, (_, default) in keys.list_settings(cls).items()} | arguments
    return {"class_path": choice["class_path"], "init_args": arguments}


def check_class_has_keys(base: type, cls: type, arguments: Tree, key: str, known: KnownKeys) -> None:
    """Check that no argument of a class, often the default one, is only a key of another class.

    Raises:
        UserError: naming that class.
    """
    settings = keys.list_settings(cls)
    for name in arguments:
        if name in settings or keys.has_var_keywords(cls) or find_hint(f"{key}.{name}", known()):
            continue
        for other, path in CLASS_PATHS[base].items():
            if name in keys.list_settings(import_class(path, key)):
                raise UserError(f"{key}.{name} is not a key of {cls.__name__}, but of {other}; set {key}: {other}")


def collect_settings(recipe: type, configs: Iterable[str], flags: Iterable[Flag], *, trusted: bool = True) -> Tree:
    """Merge the keys of all YAML files and then of all flags, classes and whole groups before single keys.

    Args:
        trusted: whether flags may name files, and classes by any dotted path.
    """
    tree: Tree = {}
    aliases = find_aliases(recipe)
    for source in configs:
        values = rename_aliases(read_yaml(find_config_file(source)), aliases)
        keys.check_utf8(values, "")
        tree = merge_settings(recipe, tree, values, trusted=not is_url(source))
    settings, unknown = keys.list_settings(recipe), []
    flags = [flag._replace(key=aliases.get(flag.key, flag.key)) for flag in flags]
    for flag in sorted(flags, key=count_levels):
        keys.check_utf8(flag.value, flag.key)
        if flag.key.split(".")[0] in settings:
            known = partial(list_known_keys, recipe, tree)
            new = rename_aliases(flag_to_tree(recipe, flag, known, trusted=trusted), aliases)
            tree = merge_settings(recipe, tree, new, trusted=trusted)
        else:
            unknown.append(flag.key)
    if unknown:
        raise unknown_key_error(unknown, list_known_keys(recipe, tree))
    return tree


def build_recipe(recipe: type, tree: Tree) -> Any:
    """Build the recipe from a mapping of its keys.

    Raises:
        UserError: naming the key, its value and the accepted values.
    """
    tree = name_default_classes(recipe, tree)
    normalized = normalize_settings(recipe, tree, partial(list_known_keys, recipe, tree))
    parser = build_parser(recipe)
    try:
        typed = parser.parse_object(normalized)
    except ArgumentError as error:
        raise explain_error(recipe, normalized, error) from None
    given = normalized.get("train", {})
    for key, replaced in REPLACED_DEFAULTS.items():
        if key in given and replaced not in given and typed[f"train.{key}"] is not None:
            typed[f"train.{replaced}"] = None
    try:
        values = parser.instantiate(typed)
    except Exception as error:  # jsonargparse wraps the errors that groups raise
        if user_error := find_user_error(error):
            raise user_error from None
        raise
    return recipe(**{name: values[name] for name in keys.list_settings(recipe)})


def find_user_error(error: BaseException | None) -> UserError | None:
    """Return the first UserError in the chain of causes of an exception, or None."""
    while error:
        if isinstance(error, UserError):
            return error
        error = error.__cause__ or error.__context__
    return None


def explain_error(recipe: type, tree: Tree, error: BaseException) -> UserError:
    """Convert an error of jsonargparse to one line with the key, its value and the accepted values."""
    if user_error := find_user_error(error):
        return user_error
    path = [part for key in re.findall(r'[Pp]arser key "([^"]+)"', str(error)) for part in key.split(".")]
    settings, value, hint, default = keys.list_settings(recipe), tree, None, keys.REQUIRED
    for part in path:
        value = value.get("init_args", value).get(part) if isinstance(value, dict) else value
        hint, default = settings.get(part, (None, keys.REQUIRED))
        if base := keys.find_choice_base(hint):
            settings = keys.list_settings(import_class(value["class_path"], part)) if base and value else {}
        elif group := keys.find_group(hint) or keys.find_item_group(hint):
            settings = keys.list_settings(group)
    if path and keys.find_choice_base(hint) and isinstance(value, dict):
        reason = next(iter(re.findall(r"^ *- (.+)$", str(error), re.MULTILINE)), "a value has the wrong type")
        return UserError(f"{'.'.join(path)}: {reason}; --{path[0]}.help CLASS describes the values")
    if path and hint is not None:
        return keys.wrong_value_error(".".join(path), value, hint, default)
    return UserError(" ".join(str(error).split()))
