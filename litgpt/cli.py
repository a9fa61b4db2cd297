"""Parse a command line to a recipe and run its command; errors are printed in one line."""

import errno
import gc
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

from litgpt.errors import UserError
from litgpt.interrupts import EXIT_CODE, INTERRUPTED, exit_on_interrupt, is_program
from litgpt.messages import mute_messages
from litgpt.phases import show_phases
from litgpt.recipe.columns import format_columns
from litgpt.recipe.commands import COMMANDS, DRY_RUN, Command, import_object
from litgpt.recipe.find_command import find_command
from litgpt.recipe.paths import resolve_paths
from litgpt.version import __version__

PATH_ERRORS = {
    getattr(errno, name)
    for name in ("EACCES", "EPERM", "EROFS", "EISDIR", "ENOTDIR", "EEXIST", "ENAMETOOLONG", "ELOOP", "ENOTEMPTY")
}
"""Errors of a path that the user gave, rather than of the program."""

FOOTER = (
    "Every command accepts --config with a file, a URL or the name of a recipe,",
    "--KEY VALUE for each key of its YAML, --print_config, which prints the resulting",
    "YAML, and --help. With --dry_run, those that train plan the run only.",
)

OTHERS_WAIT = 10.0  # seconds


class CommandLine(NamedTuple):
    """A parsed command line.

    Attributes:
        arguments: positional arguments.
        flags: (key, value) of each flag.
        configs: the files and URLs of `--config`.
        help: the group of keys after `--help`, empty if it has none; None without that flag.
        print_config: the value of `--print_config`, or None without that flag.
    """

    arguments: list[str]
    flags: list[tuple[str, str]]
    configs: list[str]
    help: str | None
    print_config: str | None


def format_overview() -> str:
    """Return the text of `litgpt --help`."""
    lines = format_columns(((name, command.help) for name, command in COMMANDS.items()), left=20)
    return "\n".join(["usage: litgpt COMMAND ...", "", *lines, "", *FOOTER])


def split_arguments(argv: list[str], switches: Sequence[str] = ()) -> CommandLine:
    """Split a command line into positional arguments and flags; a flag has one value, after a space or `=`.

    Args:
        argv: the words of the command line.
        switches: flags that are true without a value.
    """
    if (topic := find_help_topic(argv)) is not None:
        return CommandLine([], [], [], topic, None)
    line = CommandLine([], [], [], None, find_print_flags(argv))
    rest = iter(word for word in argv if not word.startswith("--print_config"))
    for word in rest:
        if not word.startswith("--"):
            line.arguments.append(word)
            continue
        key, equals, value = word[2:].partition("=")
        if not equals and key in switches:
            value = "true"
        elif not equals:
            value = next(rest, "" if key.endswith(".help") else "--")
            if value.startswith("--") and " " not in value.strip():  # several words are a quoted value
                raise UserError(f"--{key}: needs a value")
        if key == "config":
            line.configs.append(value)
        else:
            line.flags.append((key, value))
    return line


def find_help_topic(argv: list[str]) -> str | None:
    """Return the word after `--help`, empty if there is none; None without that flag."""
    for word, following in zip(argv, [*argv, ""][1:], strict=True):
        flag, equals, value = word.partition("=")
        if flag in ("-h", "--help"):
            return value if equals else following * (not following.startswith("-"))
    return None


def find_print_flags(argv: list[str]) -> str | None:
    """Return the value of `--print_config=`, empty if it has none; None without that flag."""
    flags = [word for word in argv if word.split("=")[0] == "--print_config"]
    return flags[-1].partition("=")[2] if flags else None


def collect_flags(line: CommandLine, command: Command) -> list[tuple[str, str]]:
    """Return the flags of a command line, preceded by its positional arguments with their keys."""
    arguments, last = line.arguments, len(command.positionals) - 1
    if command.repeats and len(arguments) > last:
        arguments = [*arguments[:last], json.dumps(arguments[last:])]
    if len(arguments) > len(command.positionals):
        extra = arguments[len(command.positionals)]
        raise UserError(f"{extra!r} is an unexpected argument; put a value after its --key")
    return [*zip(command.positionals, arguments, strict=False), *line.flags]


def read_recipe(name: str, line: CommandLine) -> Any:
    """Build the recipe of a command line; None if it only prints help or the configuration."""
    from litgpt.recipe import build, help_text, show

    command = COMMANDS[name]
    if line.help is not None:
        return help_text.print_help(name, line.help)
    recipe = command.import_recipe()
    flags = [build.Flag(key, value) for key, value in collect_flags(line, command)]
    if DRY_RUN in command.switches:
        flags = [flag for flag in flags if flag.key != DRY_RUN]
    if help_flag := next((flag for flag in flags if flag.key.endswith(".help")), None):
        return help_text.print_topic(recipe, help_flag.key.removesuffix(".help"), help_flag.value)
    if command.plans_run:
        return read_run_to_plan(flags, line)
    tree = build.collect_settings(recipe, line.configs, flags)
    if line.print_config is not None:
        return show.print_config(recipe, tree, line.print_config)
    return build.build_recipe(recipe, tree)


def read_run_to_plan(flags: list[Any], line: CommandLine) -> Any:
    """Build the settings of a plan and the recipe of its run; None if the configuration of the run is printed."""
    from litgpt.recipe import build, plan, show

    plan_flags, others = plan.split_flags(flags)
    settings = build.build_recipe(plan.Plan, build.collect_settings(plan.Plan, [], plan_flags))
    name = settings.command or plan.infer_command(line.configs, others)
    recipe = COMMANDS[name].import_recipe()
    tree = build.collect_settings(recipe, line.configs, others)
    if line.print_config is not None:
        return show.print_config(recipe, tree, line.print_config)
    return plan.RunToPlan(settings, name, build.build_recipe(recipe, tree))


def is_dry_run(name: str, line: CommandLine) -> bool:
    """Whether a command only plans its run.

    Raises:
        UserError: if the switch has another value than true or false.
    """
    values = [value for key, value in line.flags if key == DRY_RUN and DRY_RUN in COMMANDS[name].switches]
    if values and values[-1] not in ("true", "false"):
        raise UserError(f"{DRY_RUN}: {values[-1]!r} is not valid; use true or false")
    return values[-1:] == ["true"]


def run_command(name: str, recipe: Any, *, dry_run: bool = False) -> None:
    """Run a command with its recipe; with `dry_run`, print the plan of its run on the first process."""
    from litgpt.recipe.object_url import format_path
    from litgpt.recipe.training import Training

    if name == "pretrain" and recipe.model_name == "list":
        print("\n".join(["Available values:", *import_object("litgpt.model.registry:list_model_names")()]))
        return
    if check := COMMANDS[name].check:
        import_undisturbed(f"litgpt.train.early_checks:{check}")(recipe)
    if dry_run:
        if get_local_rank() == 0:
            import_undisturbed("litgpt.commands.plan:run_dry")(name, recipe)
        return
    if isinstance(recipe, Training) and get_local_rank() == 0:  # before seconds of imports
        model = format_path(getattr(recipe, COMMANDS[name].positionals[0]))
        print(f"litgpt {name} {model}: output in {recipe.out_dir}")
        header = import_object("litgpt.train.header:list_early_rows")(recipe)
        print(import_object("litgpt.train.header:format_rows")(header), flush=True)
    explaining = nullcontext()
    if isinstance(recipe, Training):
        explaining = import_undisturbed("litgpt.plan.out_of_memory:explain_out_of_memory")(name, recipe)
    with explaining:
        import_undisturbed(f"litgpt.commands.{COMMANDS[name].module}:run")(recipe)


def import_undisturbed(path: str) -> Any:
    """Import an object while Python does not look for garbage, which it would do in all that was imported before.

    In the program, whose modules stay until it ends, it does not look there later either.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return import_object(path)
    finally:
        if is_program.is_set():
            gc.freeze()
        if was_enabled:
            gc.enable()


def get_local_rank() -> int:
    """The index of this process among those that torchrun, SLURM or this program started on this machine."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)


def print_error(error: UserError, code: int) -> int:
    """Print an error in one line on stderr and return the exit code.

    Other processes of a run wait for the first one, which has the same error: torchrun ends them when it exits.
    """
    if get_local_rank() > 0:
        time.sleep(OTHERS_WAIT)
    print(f"litgpt: error: {error}", file=sys.stderr)
    return code


def print_interrupt() -> int:
    """Print on stderr, in the first process, that Ctrl-C ended the command, and return the exit code."""
    if get_local_rank() == 0:
        print(INTERRUPTED, file=sys.stderr)
    return EXIT_CODE


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Returns:
        The exit code: 0 for success, 2 for an invalid command line or recipe, 1 for an error while running, 130 for
        an interrupt.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(format_overview())
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    try:
        name, rest = find_command(argv)
        line = split_arguments(rest, COMMANDS[name].switches)
        recipe, dry_run = read_recipe(name, line), is_dry_run(name, line)
        recipe = recipe and resolve_paths(name, recipe)
    except UserError as error:
        return print_error(error, 2)
    except KeyboardInterrupt:
        return print_interrupt()
    try:
        if recipe is not None:
            is_first = get_local_rank() == 0
            display = import_object("litgpt.train.console:build_phase_display")(enabled=is_first)
            with (
                exit_on_interrupt(INTERRUPTED if is_first else ""),
                show_phases(display),
                mute_messages(muted=not is_first),
            ):
                run_command(name, recipe, dry_run=dry_run)
    except UserError as error:
        return print_error(error, 1)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            cure = "free disk space; earlier checkpoints are intact"
        elif error.filename is not None and error.errno in PATH_ERRORS:
            cure = "use a path that can be read and written"
        else:
            raise
        return print_error(UserError(f"{error.filename or 'writing'}: {error.strerror}; {cure}"), 1)
    except KeyboardInterrupt:
        return print_interrupt()
    return 0
