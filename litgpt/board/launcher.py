"""Start, stop, resume and plan the runs below a folder, from the texts of a form."""

import asyncio
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from litgpt.board.form import (
    RUN_COMMANDS,
    check_run_settings,
    choose_out_dir,
    describe_form,
    fill_form,
    import_run_recipe,
    read_form,
)
from litgpt.board.run_processes import RunProcesses
from litgpt.board.runs import SILENT_SECONDS, RunFolders, name_state
from litgpt.errors import UserError
from litgpt.files import read_json_object, write_text
from litgpt.recipe import build
from litgpt.recipe.to_yaml import format_yaml
from litgpt.train.run_record import RECORD_FILE

PLAN_SECONDS = 120


class Launcher:
    """Starts and ends the processes of runs below a folder."""

    def __init__(self, runs: RunFolders, processes: RunProcesses) -> None:
        self.runs, self.processes = runs, processes
        self.plan_lock = asyncio.Lock()  # one plan at a time, of which each needs a core

    def describe_form(self, command: str, run: str | None) -> dict[str, Any]:
        """The form of a command, with the settings that a run has changed, and a folder of its own."""
        form, values = describe_form(command), {}
        if run is not None:
            values = fill_form(command, read_json_object(self.runs.find(run) / RECORD_FILE).get("changes", {}))
        return form | {"values": values | {"out_dir": str(choose_out_dir(self.runs.folder))}}

    def check(self, command: str, texts: Mapping[str, str]) -> dict[str, Any]:
        """The recipe in YAML that the texts of a form are, and the folder of its run.

        Raises:
            UserError: naming the key of the first text that is not valid.
        """
        settings = read_form(command, texts)
        recipe = check_run_settings(command, settings)
        folder = recipe.out_dir.resolve()
        if not folder.is_relative_to(self.runs.folder) or folder == self.runs.folder:
            raise UserError(f"out_dir: {recipe.out_dir} is not in {self.runs.folder}; set a folder in it")
        if (folder / RECORD_FILE).exists():
            raise UserError(f"out_dir: {recipe.out_dir} holds a run already; resume that one, or set another out_dir")
        return {"recipe": format_yaml(settings), "out_dir": str(folder)}

    def start(self, command: str, texts: Mapping[str, str]) -> str:
        """Start the run of a form and return its name."""
        checked = self.check(command, texts)
        folder = Path(checked["out_dir"])
        self.processes.start(command, folder, ["--out_dir", str(folder)], checked["recipe"])
        return folder.relative_to(self.runs.folder).as_posix()

    def resume(self, name: str) -> None:
        """Resume a run from its latest checkpoint, with its own recipe.

        Raises:
            UserError: if it has no checkpoint, or its record no command, or its recipe is not valid, or it is running.
        """
        folder = self.runs.find(name)
        summary, is_here = self.runs.summarize(name, folder), self.processes.is_running(folder)
        if not is_here and name_state(summary, is_running=False) == "running":
            host = summary.get("host") or "another machine"
            raise UserError(f"run: {name} has written files on {host} in the last {SILENT_SECONDS} s; stop it there")
        command = self.find_command(folder)
        if command is None:
            raise UserError(f"run: {folder / RECORD_FILE} does not name a command; resume it on the command line")
        flags = [build.Flag("resume", "true"), build.Flag("out_dir", str(folder))]
        settings = build.collect_settings(import_run_recipe(command), [str(folder / "recipe.yaml")], flags)
        check_run_settings(command, settings)
        self.processes.start(command, folder, ["--resume", "true", "--out_dir", str(folder)])

    def find_command(self, folder: Path) -> str | None:
        """The command that started a run; None if its record does not have it."""
        try:
            command = read_json_object(folder / RECORD_FILE).get("command")
        except UserError:  # which the page of the run names
            return None
        return command if command in RUN_COMMANDS else None

    async def plan(self, command: str, texts: Mapping[str, str], gpu: str | None) -> str:
        """What `litgpt plan` prints about the run of a form.

        Raises:
            UserError: the error that it prints, or that it takes too long.
        """
        settings = read_form(command, texts)
        with tempfile.TemporaryDirectory() as folder:
            write_text(Path(folder) / "recipe.yaml", format_yaml(settings))
            arguments = ["plan", command, "--config", f"{folder}/recipe.yaml", *(["--gpu", gpu] if gpu else [])]
            async with self.plan_lock:
                return await self._run_plan(arguments)

    async def _run_plan(self, arguments: list[str]) -> str:
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *self.processes.program, *arguments, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe
        )
        try:
            output, errors = await asyncio.wait_for(process.communicate(), PLAN_SECONDS)
        except TimeoutError:
            raise UserError(f"plan: takes more than {PLAN_SECONDS} seconds; use litgpt plan") from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode:
            last = errors.decode(errors="replace").strip().rpartition("\n")[2]
            raise UserError(last.removeprefix("litgpt: error: ") or f"plan: ended with code {process.returncode}")
        return output.decode(errors="replace")
