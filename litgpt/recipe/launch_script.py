"""Read launch scripts of Megatron-SWIFT and ms-swift: the programs that they start, with options and environment."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from litgpt.errors import UserError
from litgpt.recipe.from_yaml import read_yaml

ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?::?-([^}]*))?\})")
REDIRECTION = re.compile(r"[\d&]?>{1,2}(.*)")
PROGRAMS = ("megatron", "swift")
SCRIPTS = {"pretrain_gpt": ("megatron", "pt")}
"""Python scripts that are no command of either program, by their names."""
SEPARATORS = frozenset(";&|")


@dataclass(frozen=True)
class Launch:
    """A program that a script starts.

    Attributes:
        program: megatron or swift.
        verb: its command, such as sft.
        options: the values of each option, by the name in the script; empty for an option without a value.
        environment: the variables before it.
        extra: arguments that belong to no option.
    """

    program: str
    verb: str
    options: dict[str, list[str]]
    environment: dict[str, str] = field(default_factory=dict)
    extra: list[str] = field(default_factory=list)


def split_words(line: str) -> list[str]:
    """Split a line as a shell does; `;`, `&` and `|` are words. A comment at its end is left out."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="".join(SEPARATORS))
    lexer.whitespace_split, lexer.commenters = True, ""
    words = []
    for word in lexer:
        if word.startswith("#"):
            break
        words.append(word)
    return words


def iter_lines(text: str, source: str) -> Iterator[list[str]]:
    """Yield the words of each line, joined with those that continue it.

    Raises:
        UserError: naming the line of a quotation that is not closed.
    """
    pending, start = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("#"):
            continue
        start = start if pending else number
        if line.rstrip().endswith("\\"):
            pending += line.rstrip()[:-1] + " "
            continue
        try:
            words = split_words(pending + line)
        except ValueError:  # a quotation that ends on a later line
            pending += line + "\n"
            continue
        pending = ""
        yield words
    if pending:
        try:
            yield split_words(pending)
        except ValueError as error:
            raise UserError(f"{source}:{start}: {str(error).lower()}; close it with the quotation mark") from None


def expand_variables(word: str, variables: dict[str, str]) -> str:
    """Replace the variables in a word that are known, or have a default; the others stay."""

    def replace(match: re.Match[str]) -> str:
        name, default = match[1] or match[2], match[3]
        return variables.get(name, match[0] if default is None else default)

    return VARIABLE.sub(replace, word)


def split_commands(words: list[str]) -> Iterator[list[str]]:
    """Split words at `;`, `&` and `|` into commands, without redirections of their output."""
    command: list[str] = []
    skip = False
    for word in words:
        redirection = REDIRECTION.fullmatch(word)
        if set(word) <= SEPARATORS:
            yield command
            command = []
        elif redirection or skip:
            skip = bool(redirection and not redirection[1])
        else:
            command.append(word)
    yield command


def split_options(words: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Split arguments into options with their values, and those before the first option."""
    options: dict[str, list[str]] = {}
    extra: list[str] = []
    values = extra
    for word in words:
        if not word.startswith("--"):
            values.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        values = options[name.replace("-", "_")] = [value] if equals else []
    return options, extra


def find_program(words: list[str]) -> tuple[str, str, int, int] | None:
    """Find the program in a command: its name, its command, and the positions of both; None if there is none."""
    for place, word in enumerate(words):
        if word in PROGRAMS and place + 1 < len(words):
            return word, words[place + 1], place, place + 2
        path = PurePath(word.replace("swift.cli.", "swift/cli/") + ".py" * word.startswith("swift.cli."))
        if path.suffix == ".py":
            is_swift = "swift" in path.parts
            known = ("megatron" if "_megatron" in str(path) else "swift", path.stem) if is_swift else None
            program = SCRIPTS.get(path.stem, known)
            return program and (*program, place, place + 1)
    return None


def read_launch(words: list[str], environment: dict[str, str]) -> Launch | None:
    """Read a command; None if it starts neither program."""
    program_words = find_program(words)
    if program_words is None:
        return None
    program, verb, before, after = program_words
    launcher, _ = split_options(words[:before])
    options, extra = split_options(words[after:])
    config = options.pop("config", None)
    if config == []:
        raise UserError(f"{program} {verb}: --config: needs a file")
    if config:
        options = {name: list_words(value) for name, value in read_yaml(config[0]).items()} | options
    return Launch(program, verb, launcher | options, environment, extra)


def list_words(value: Any) -> list[str]:
    """Return the value of an option in a YAML file as words."""
    return [str(item) for item in (value if isinstance(value, list) else [value])]


def parse_launch(text: str, program: str, source: str) -> Launch:
    """Read arguments, which may begin with the command (`sft`), or with `megatron sft`.

    Raises:
        UserError: if a quotation is not closed, or there are no options.
    """
    words = [word for line in iter_lines(text, source) for word in line]
    if not any(word.startswith("--") for word in words):
        raise UserError(f"{source}: {text!r} has no options; give them in quotes, such as {source} '--lr 1e-5'")
    environment = take_assignments(words, {})
    if find_program(words) is None:
        verbs = [] if words[0].startswith("--") else [words.pop(0)]
        options = split_options(words)[0]
        guess = "export" if {"to_hf", "to_mcore"} & set(options) else "rlhf" if "rlhf_type" in options else "sft"
        words = [program, *(verbs or [guess]), *words]
    launch = read_launch(words, environment)
    assert launch is not None
    return launch


def take_assignments(words: list[str], variables: dict[str, str]) -> dict[str, str]:
    """Remove the assignments at the start of a command, and return them."""
    assignments = {}
    while words and (match := ASSIGNMENT.fullmatch(words[0])):
        assignments[match[1]] = expand_variables(match[2], variables)
        words.pop(0)
    return assignments


def read_script(text: str, source: str) -> list[Launch]:
    """Read the programs that a script starts, in order.

    Raises:
        UserError: if a quotation is not closed, or it starts neither program.
    """
    variables: dict[str, str] = {}
    exported: dict[str, str] = {}
    launches = []
    for line in iter_lines(text, source):
        for words in split_commands(line):
            is_export = words[:1] == ["export"]
            words = words[is_export:]
            assignments = take_assignments(words, variables)
            if not words:
                variables |= assignments
                exported |= assignments if is_export else {}
                continue
            launch = read_launch([expand_variables(word, variables) for word in words], exported | assignments)
            if launch is not None:
                launches.append(launch)
    if not launches:
        raise UserError(f"{source}: starts neither megatron nor swift; give the script that does")
    return launches
