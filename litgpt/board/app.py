"""The routes of the board."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

from fastapi import FastAPI, Query, Request, Response
from pydantic import BaseModel

from litgpt.board.access import check_host, check_origin
from litgpt.board.form import RUN_COMMANDS, find_wrong_key
from litgpt.board.launcher import Launcher
from litgpt.board.run_processes import RunProcesses
from litgpt.board.runs import RunFolders, UnknownRunError, name_state
from litgpt.errors import UserError
from litgpt.infer.server import chat_page
from litgpt.infer.server.errors import ApiError, add_error_handlers, write_error
from litgpt.infer.server.page_files import list_page_files, send_files
from litgpt.infer.server.request_checks import check_key, check_size
from litgpt.recipe.gpu import GpuName
from litgpt.recipe.plan import PlannedCommand
from litgpt.train import report

MAX_BODY_BYTES = 1_000_000
REPORT_FILES = ("report.css", "charts.js", "chart_controls.html")
PAGE_FILES = {
    **list_page_files(Path(__file__).parent / "page"),
    "/page/icon.svg": chat_page.FILES["/page/icon.svg"],
    **{f"/page/{name}": Path(report.__file__).with_name(name) for name in REPORT_FILES},
}
Names = Annotated[list[str], Query(alias="run", max_length=100)]


class FormTexts(BaseModel):
    """The texts of a form by key."""

    command: str
    values: dict[str, str]


class PlanTexts(FormTexts):
    """The texts of a form, and the GPU that its run should fit on."""

    gpu: GpuName | None = None


class RunName(BaseModel):
    """The name of a run."""

    run: str


@dataclass(frozen=True)
class BoardSettings:
    """Settings of a board.

    Attributes:
        host: the address that it listens on.
        api_key: that the page sends as a bearer token.
    """

    host: str
    api_key: str


class BoardServer:
    """Answers the requests of the page about the runs below a folder."""

    def __init__(self, folder: Path, settings: BoardSettings, processes: RunProcesses) -> None:
        self.runs, self.settings, self.processes = RunFolders(folder), settings, processes
        self.launcher = Launcher(self.runs, processes)
        self.read_lock = asyncio.Lock()  # one thread reads files at a time

    async def read(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """The result of work that reads files, in another thread."""
        async with self.read_lock:
            try:
                return await asyncio.to_thread(work, *arguments)
            except UnknownRunError as error:
                raise ApiError(404, str(error), param="run") from None
            except OSError as error:  # a file was removed meanwhile
                raise ApiError(404, f"{error.filename}: {error.strerror}", param="run") from None

    async def list_runs(self) -> dict[str, Any]:
        """All runs, with their last figures."""
        return await self.read(self._list_runs)

    def _list_runs(self) -> dict[str, Any]:
        runs = []
        for name, folder in self.runs.find_all().items():
            summary = self.runs.summarize(name, folder)
            runs.append(summary | {"state": name_state(summary, is_running=self.processes.is_running(folder))})
        return {"folder": str(self.runs.folder), "runs": sorted(runs, key=lambda run: -run.get("updated", 0))}

    def _find_state(self, name: str, folder: Path) -> str:
        return name_state(self.runs.summarize(name, folder), is_running=self.processes.is_running(folder))

    async def show_run(self, name: Annotated[str, Query(alias="run")], stamp: str = "") -> Any:
        """The page of a run; nothing if it has not changed since a stamp."""
        return await self.read(self._describe, [name], stamp, lambda: self._describe_run(name))

    async def compare_runs(self, names: Names, stamp: str = "") -> Any:
        """The page that compares several runs; nothing if none has changed since a stamp."""
        return await self.read(self._describe, names, stamp, lambda: self.runs.compare(names))

    def _describe(self, names: list[str], stamp: str, describe: Callable[[], dict[str, Any]]) -> Any:
        states = [self._find_state(name, self.runs.find(name)) for name in names]
        current = "-".join(map(str, (*self.runs.stamp(names), *states)))
        return Response(status_code=204) if current == stamp else describe() | {"stamp": current}

    def _describe_run(self, name: str) -> dict[str, Any]:
        folder = self.runs.find(name)
        return self.runs.describe(name) | {
            "is_running": self.processes.is_running(folder),
            "state": self._find_state(name, folder),
            "output": self.processes.read_output(folder),
            "command": self.launcher.find_command(folder),
        }

    async def show_form(self, command: str = RUN_COMMANDS[0], run: str | None = None) -> dict[str, Any]:
        """The fields of the form of a command, with the settings of a run."""
        form = await self.read(self.launcher.describe_form, command, run)
        return form | {"commands": RUN_COMMANDS, "gpus": get_args(GpuName), "planned": get_args(PlannedCommand)}

    async def check_form(self, body: FormTexts) -> dict[str, Any]:
        """The recipe of a form, or its first error."""
        return await self._launch(body.values, self.launcher.check, body.command, body.values)

    async def start_run(self, body: FormTexts) -> dict[str, Any]:
        """Start the run of a form."""
        return {"run": await self._launch(body.values, self.launcher.start, body.command, body.values)}

    async def stop_run(self, body: RunName) -> dict[str, Any]:
        """Ask a run to save a checkpoint and to end."""
        await self.read(lambda: self.processes.stop(self.runs.find(body.run)))
        return {"run": body.run}

    async def resume_run(self, body: RunName) -> dict[str, Any]:
        """Resume a run."""
        await self.read(self.launcher.resume, body.run)
        return {"run": body.run}

    async def plan_run(self, body: PlanTexts) -> dict[str, Any]:
        """What `litgpt plan` prints about the run of a form."""
        try:
            return {"plan": await self.launcher.plan(body.command, body.values, body.gpu)}
        except UserError as error:
            raise ApiError(400, str(error), param=find_wrong_key(error, body.values)) from None

    async def _launch(self, texts: dict[str, str], work: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return await self.read(work, *arguments)
        except UserError as error:
            raise ApiError(400, str(error), param=find_wrong_key(error, texts)) from None


def build_board(server: BoardServer) -> FastAPI:
    """The application of a board."""
    app = FastAPI(title="litgpt board", docs_url=None, redoc_url=None, openapi_url=None)
    app.get("/api/runs")(server.list_runs)
    app.get("/api/run", response_model=None)(server.show_run)
    app.get("/api/comparison", response_model=None)(server.compare_runs)
    app.get("/api/form")(server.show_form)
    app.post("/api/check")(server.check_form)
    app.post("/api/start")(server.start_run)
    app.post("/api/stop")(server.stop_run)
    app.post("/api/resume")(server.resume_run)
    app.post("/api/plan")(server.plan_run)
    send_file = send_files(PAGE_FILES)
    for path in PAGE_FILES:
        app.get(path)(send_file)
    add_error_handlers(app)

    @app.middleware("http")
    async def check(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        try:
            check_host(server.settings.host, request)
            if request.method != "GET" or request.url.path not in PAGE_FILES:
                check_origin(request)
                check_key(server.settings.api_key, request)
            check_size(MAX_BODY_BYTES, request)
            return await call_next(request)
        except ApiError as error:
            return write_error(error)

    return app
