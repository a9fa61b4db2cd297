"""Translate a launch of Megatron-SWIFT or ms-swift to the recipe of a command, option by option."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from litgpt.recipe.commands import COMMANDS
from litgpt.recipe.data import DataModule
from litgpt.recipe.keys import REQUIRED, find_choice_base, find_group, list_settings
from litgpt.recipe.launch_options import ALIGNMENTS, LaunchOptions, parse_words, unknown_layers
from litgpt.recipe.launch_script import VARIABLE, Launch
from litgpt.recipe.optimizer import OPTIMIZERS
from litgpt.recipe.option_table import Option, RefusedValue, index_options, load_options, write_value
from litgpt.recipe.option_transforms import TRANSFORMS, Settings, as_list
from litgpt.recipe.tuner import TUNERS

PROGRAM_NAMES = {"megatron": "Megatron-SWIFT", "swift": "ms-swift"}
CLASSES: dict[str, Mapping[str, type]] = {"optimizer": OPTIMIZERS, "tuner": TUNERS}

list_command_settings = cache(list_settings)  # resolving the types of a recipe takes a millisecond


@dataclass
class RecipeTranslation:
    """The recipe that does the same as a launch, and what it does not say.

    Attributes:
        launch: the launch.
        command: the command of litgpt; empty if there is none to run.
        no_command: why there is none.
        settings: the values of the recipe, by dotted keys.
        comments: the comments on these keys.
        missing: keys that the command needs and the launch does not have.
        unset: options without a setting, each with the reason.
        refused: options that are refused, each with the reason.
        left_over: options and arguments that are not known, or that the command does not have.
    """

    launch: Launch
    command: str
    no_command: str = ""
    settings: Settings = field(default_factory=dict)
    comments: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unset: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)

    def list_classes(self) -> dict[str, str]:
        """Return the classes of the keys that are a class with settings: those that are set, or else the command's."""
        classes = {
            "data": "Preferences" if self.command in ALIGNMENTS.values() else "Conversations",
            "optimizer": "AdamW",
            "tuner": "Full" if self.command == "finetune_full" else "LoRA",
        }
        return {key: self.settings.get(key, name) for key, name in classes.items()}

    def set_key(self, key: str, value: Any, comment: str) -> None:
        """Set a key, and add a comment to those that it has."""
        self.settings[key] = value
        if comment:
            self.comments[key] = ", ".join(filter(None, (self.comments.get(key), comment)))


class Unset(Exception):
    """An option that needs no setting; the message is the reason."""


def is_off(value: Any) -> bool:
    """Whether a value switches an option off."""
    return value in (None, False, 0, "", "none")


def translate_value(option: Option, value: Any, launch: LaunchOptions) -> Settings:
    """Translate the value of an option to settings.

    Raises:
        Unset: if nothing is to be set.
        RefusedValue: if the option, or the value, is refused.
    """
    if list(launch.list_unmet({name: wanted for name, wanted in option.when.items() if name == "command"})):
        raise Unset(f"it has no effect in litgpt {launch.command}")
    if unmet := list(launch.list_unmet(option.when)):
        raise Unset(f"it has an effect only {' and '.join(unmet)}")
    if write_value(value) in option.already:
        raise Unset(option.note or "always so")
    key, colon, fixed = (option.key or "").partition(": ")
    if option.reason and (not key or is_off(value)):
        if is_off(value):
            raise Unset("always so")
        raise RefusedValue(option.reason)
    if not key:
        raise Unset(option.note)
    if (colon and is_off(value)) or value in (None, ""):
        raise Unset("it is off")
    if isinstance(value, list) and not option.is_list:
        raise RefusedValue("it has one value")
    if option.values:
        settings = {key: find_value(option, value)}
    elif option.transform:
        settings = TRANSFORMS[option.transform](key, value, launch)
    else:
        settings = {key: parse_words([fixed]) if colon else as_list(value) if option.is_list else value}
    return {**settings, **option.extra} if settings else {}


def find_value(option: Option, value: Any) -> Any:
    """Return our value for theirs."""
    if write_value(value) not in option.values:
        raise RefusedValue(option.reason or f"the values are {', '.join(option.values)}")
    return option.values[write_value(value)]


def list_sources(launch: Launch) -> dict[str, tuple[str, list[str]]]:
    """Return the options and variables of a launch: by name, their text in the script and their values."""
    variables = {name: (f"{name}={value}", [value]) for name, value in launch.environment.items()}
    options = {name: (" ".join([f"--{name}", *values]), values) for name, values in launch.options.items()}
    return variables | options


def find_default(command: str, key: str, classes: Mapping[str, type]) -> Any:
    """Return the default of a key in the recipe of a command; REQUIRED if it has none, or has it in the data."""
    settings, default = list_command_settings(COMMANDS[command].import_recipe()), REQUIRED
    for part in key.split("."):
        if part not in settings:
            return REQUIRED
        hint, default = settings[part]
        if group := find_group(hint):
            settings = {
                name: (kind, getattr(default, name, REQUIRED))
                for name, (kind, _) in list_command_settings(group).items()
            }
        elif part in classes:
            settings, default = list_command_settings(classes[part]), type(default).__name__
        elif find_choice_base(hint) is DataModule:
            return REQUIRED
    return default


def add_option(translation: RecipeTranslation, launch: LaunchOptions, name: str, text: str, words: list[str]) -> None:
    """Add an option of the script to the translation."""
    option = index_options().get(name)
    if option is None:
        translation.left_over.append(f"{text}: not an option of the table")
        return
    if any("$(" in word or "`" in word for word in words):
        translation.left_over.append(f"{text}: commands in a script are not run")
        return
    if names := [match[0] for word in words for match in VARIABLE.finditer(word)]:
        keys = f"; set {option.key}" if option.key else ""
        translation.left_over.append(f"{text}: {names[0]} is not set in the script{keys}")
        return
    value = parse_words(words, is_text=option.is_text)
    try:
        settings = translate_value(option, value, launch)
    except Unset as unset:
        translation.unset.append(f"{text}: {unset}")
        return
    except RefusedValue as refusal:
        translation.refused.append(f"{text}: {refusal}")
        return
    known = list_command_settings(COMMANDS[translation.command].import_recipe())
    unknown = [key for key in settings if key.split(".")[0] not in known]
    if unknown or not settings:
        command = (
            f"litgpt {translation.command} has no {unknown[0]}"
            if unknown
            else option.note or "it is that of the command"
        )
        (translation.left_over if unknown else translation.unset).append(f"{text}: {command}")
        return
    for key, setting in settings.items():
        changed = option.state == "other" or (option.state == "translated" and setting != value)
        comment = "; ".join(filter(None, (text if changed else "", option.note)))
        translation.set_key(key, setting, comment)


def add_defaults(translation: RecipeTranslation, launch: LaunchOptions) -> None:
    """Add the defaults of the program that differ from those of the command, for keys that the script does not set."""
    comment = f"default of {PROGRAM_NAMES[translation.launch.program]}"
    classes = {key: table[translation.list_classes()[key]] for key, table in CLASSES.items()}
    given, known = set(translation.settings), list_command_settings(COMMANDS[translation.command].import_recipe())
    for name, value in launch.defaults.items():
        if launch.is_given(name):
            continue
        try:
            settings = translate_value(index_options()[name], value, launch)
        except (Unset, RefusedValue):
            continue
        for key, setting in settings.items():
            is_known = key.split(".")[0] in known and key not in given
            if is_known and find_default(translation.command, key, classes) != setting:
                translation.settings[key] = setting
                translation.comments.setdefault(key, comment)


def list_missing_keys(translation: RecipeTranslation) -> list[str]:
    """List the keys that a command needs and the translation does not have."""
    settings = list_command_settings(COMMANDS[translation.command].import_recipe())
    needed = [name for name, (_, default) in settings.items() if default is REQUIRED]
    if any(key.startswith("data.") for key in translation.settings):
        needed.append("data.sources")
    return [key for key in needed if key not in translation.settings]


def translate(
    launch: Launch,
    converted: Mapping[str, str] | None = None,
    find_layers: Callable[[str], int | None] = unknown_layers,
) -> RecipeTranslation:
    """Translate a launch.

    Args:
        launch: the launch.
        converted: folders in Megatron's format, and the models that they were made from.
        find_layers: returns the number of layers of a model by its name; None if it is not known.
    """
    options = LaunchOptions(launch, converted or {}, find_layers)
    if not options.command:
        return RecipeTranslation(launch, "", options.explain_no_command())
    translation = RecipeTranslation(launch, options.command)
    sources, order = list_sources(launch), {option.name: place for place, option in enumerate(load_options())}
    known = index_options()
    for name in sorted(sources, key=lambda name: order[known[name].name] if name in known else len(order)):
        add_option(translation, options, name, *sources[name])
    translation.left_over += [f"{word}: not the value of an option" for word in launch.extra]
    if options.is_training:
        add_defaults(translation, options)
    translation.missing = list_missing_keys(translation)
    return translation


def translate_script(
    launches: list[Launch], find_layers: Callable[[str], int | None] = unknown_layers
) -> list[RecipeTranslation]:
    """Translate the launches of a script, in which models may be converted to Megatron's format and then trained."""
    converted: dict[str, str] = {}
    translations = []
    for launch in launches:
        translations.append(translate(launch, converted, find_layers))
        if launch.options.get("to_mcore") in ([], ["true"]):
            folder, source = (launch.options.get(name, [""])[0] for name in ("output_dir", "model"))
            converted[folder] = source
    return translations
