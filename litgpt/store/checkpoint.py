"""Training checkpoints: written sharded in the background, there whole or not at all, read under any layout.

A checkpoint is a folder `step-00000008` with one safetensors file a rank (`shard-00000-of-00002.safetensors`: weights,
optimizer state and random generators, each block with its place in the whole tensor), `progress.json`, the files that
the caller adds, and `manifest.json` (bytes and SHA-256 of every other file), written last. It is staged in
`step-00000008.partial` and appears by one rename.
"""

import json
import re
import shutil
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from litgpt.errors import UserError
from litgpt.files import MANIFEST, Damaged, publish, read_json, seal, sync_file, verify
from litgpt.store.state import (
    Optimizers,
    generator_states,
    group_settings,
    listed,
    model_tensors,
    optimizer_values,
    owned,
    restore_generators,
    restore_groups,
    restore_model,
    restore_optimizer,
)
from litgpt.store.tensors import TensorFiles, write_tensors

STEP = re.compile(r"step-(\d+)")
PROGRESS = "progress.json"
LIBRARIES = ("litgpt", "torch", "lightning", "safetensors")
MESSAGE_BYTES = 400  # of a rank's error, so that every rank can say it

Warn = Callable[[str], None]
Group = dist.ProcessGroup | None


def say(message: str) -> None:
    """Print one line on standard error."""
    print(message, file=sys.stderr, flush=True)


def place_of(group: Group = None) -> tuple[int, int]:
    """This process's rank and the number of ranks; 0 of 1 without a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def exchange(record: bytes, group: Group) -> list[bytes]:
    """Every rank's `record`, all of one length, in rank order."""
    _, ranks = place_of(group)
    if ranks == 1:
        return [record]
    device = "cuda" if "nccl" in dist.get_backend(group) else "cpu"
    mine = torch.frombuffer(bytearray(record), dtype=torch.uint8).to(device)
    all_of_them = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(all_of_them, mine, group=group)
    return [bytes(one.cpu().numpy()) for one in all_of_them]


def agree(message: str, group: Group) -> str:
    """The first message that any rank has, the same on every rank; empty if none has one."""
    record = message.encode()[:MESSAGE_BYTES].ljust(MESSAGE_BYTES, b"\0")
    messages = (one.rstrip(b"\0").decode(errors="replace") for one in exchange(record, group))
    return next((one for one in messages if one), "")


def steps_in(out_dir: Path) -> list[tuple[int, Path]]:
    """The finished checkpoint folders of a run with their steps, newest first."""
    found = [(STEP.fullmatch(path.name), path) for path in out_dir.glob("step-*") if path.is_dir()]
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def shard_name(rank: int, ranks: int) -> str:
    """The name of one rank's tensor file."""
    return f"shard-{rank:05d}-of-{ranks:05d}.safetensors"


def library_versions() -> dict[str, str]:
    """The versions of the libraries that a run depends on, for the record."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "unknown"
    return versions


class Write:
    """One rank's part of one checkpoint on its way to the disk: a thread, then a hash or an error."""

    def __init__(self, step: int, staged: Path, work: Callable[[], dict[str, str]], *, background: bool) -> None:
        self.step = step
        self.staged = staged
        self.hashes: dict[str, str] = {}
        self.error = ""
        self._work = work
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True) if background else None
        if self._thread is None:
            self._run()
        else:
            self._thread.start()

    def _run(self) -> None:
        try:
            self.hashes = self._work()
        except Exception as error:  # whatever it is, every rank must hear of it at the commit
            self.error = " ".join(f"{type(error).__name__}: {error}".split())

    def done(self) -> bool:
        return self._thread is None or not self._thread.is_alive()

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join()


class Checkpoints:
    """The checkpoints of one run: saved, committed by all ranks together, and pruned.

    `save` and `commit` are called by every rank at the same step. After `save` returns, training may go on: the values
    were copied. The folder appears at `commit`, which the ranks call once `poll` is true on all; `finish` waits.
    """

    def __init__(
        self,
        out_dir: Path | str,
        *,
        keep: int = 2,
        asynchronous: bool = True,
        on_error: Literal["stop", "continue"] = "stop",
        save_rng: bool = True,
        resumed_step: int | None = None,
        kept: Collection[str] | None = None,
        group: Group = None,
        warn: Warn = say,
    ) -> None:
        """Clear away what a dead run left half written.

        Args:
            keep: how many checkpoints that verify stay; older ones are deleted once a newer one is in place.
            asynchronous: write in a thread, from a copy in host memory (as large as the weights and moments of a rank).
            on_error: what a failed save does: end the run with a `UserError`, or say so and go on.
            resumed_step: the step this run begins at, if known: later steps are of an abandoned run.
            kept: names of the model's tensors that are written, where the others never change; None for all.
            warn: called on rank 0 with one line.
        """
        self.out_dir = Path(out_dir)
        self.keep = keep
        self.asynchronous = asynchronous
        self.on_error = on_error
        self.save_rng = save_rng
        self.resumed_step = resumed_step
        self.kept = kept
        self.group = group
        self.rank, self.ranks = place_of(group)
        self._warn = warn
        self._writing: Write | None = None
        self._committed_step: int | None = None
        self._sealed: set[Path] = set()  # written or verified by this process, so not hashed again to prune
        self._remove_stale()

    def _remove_stale(self) -> None:
        if self.rank == 0:
            for path in sorted([*self.out_dir.glob("step-*.partial"), *self.out_dir.glob("step-*.discarded")]):
                self._warn(f"{path}: left by a run that died while writing or deleting it; removed")
                shutil.rmtree(path, ignore_errors=True)
        agree("", self.group)  # nobody stages before the old is gone

    @property
    def pending(self) -> bool:
        """Whether a save waits for its commit; the same on every rank."""
        return self._writing is not None

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: Optimizers,
        progress: Mapping[str, Any],
        files: Mapping[str, str | Path] | None = None,
    ) -> None:
        """Begin a checkpoint, after committing one that is still open; a step that is saved already is left alone.

        Args:
            progress: what else the run must know to go on; JSON.
            files: further files by name: their text, or a path to copy.
        """
        self.finish()
        final = self.out_dir / f"step-{step:08d}"
        if step in (self._committed_step, self.resumed_step) and final.exists():
            return  # the same state is there already
        staged = final.with_name(f"{final.name}.partial")
        tensors, places = self._snapshot(model, listed(optimizer))
        record: dict[str, Any] = {
            **progress,
            "step": step,
            "ranks": self.ranks,
            "libraries": library_versions(),
            "groups": group_settings(model, listed(optimizer)),
        }

        def work() -> dict[str, str]:
            staged.mkdir(parents=True, exist_ok=True)
            if self.rank == 0:
                write_small_files(staged, record, files or {})
            name = shard_name(self.rank, self.ranks)
            return {name: write_tensors(staged / name, tensors, {"format": "pt", "parts": json.dumps(places)})}

        self._writing = Write(step, staged, work, background=self.asynchronous)

    def _snapshot(self, model: nn.Module, optimizers: list[Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What this rank writes: its tensors in host memory, and their places in the whole ones."""

        def everything() -> Iterator[tuple[str, Any]]:
            yield from ((f"model.{name}", tensor) for name, tensor in model_tensors(model, self.kept))
            yield from ((f"optimizer.{name}", value) for name, value in optimizer_values(model, optimizers))

        tensors, places = {}, {}
        for name, local, place in owned(everything(), self.rank, self.ranks):
            # the optimizer changes its tensors in place, so a thread needs a copy of its own
            tensors[name] = local.detach().to("cpu", copy=self.asynchronous)
            places[name] = place
        if self.save_rng:
            tensors |= {f"rng.{self.rank:05d}.{kind}": state for kind, state in generator_states().items()}
        return tensors, places

    def poll(self) -> bool:
        """Whether this rank has nothing left to write."""
        return self._writing is None or self._writing.done()

    def commit(self) -> Path | None:
        """Make the saved checkpoint appear, or say on every rank why it cannot; returns its folder, None without one.

        Raises:
            UserError: on every rank, if any rank failed to write and `on_error` is "stop".
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return None
        writing.join()
        error = agree(f"rank {self.rank}: {writing.error}" if writing.error else "", self.group)
        hashes = exchange("".join(writing.hashes.values()).encode().ljust(64), self.group)
        final = writing.staged.with_suffix("")
        if self.rank == 0 and not error:
            error = self._publish(writing, [one.decode() for one in hashes])
        error = agree(error, self.group)
        if not error:
            self._committed_step = writing.step
            return final
        if self.rank == 0:
            shutil.rmtree(writing.staged, ignore_errors=True)
        message = f"{final}: not saved ({error}); the older checkpoints are intact"
        if self.on_error == "stop":
            raise UserError(f"{message}; free space or set checkpoint.on_error: continue")
        if self.rank == 0:
            self._warn(message)
        return None

    def finish(self) -> Path | None:
        """Wait for the writing to end and commit it; nothing to do if nothing is open."""
        return self.commit()

    def _publish(self, writing: Write, hashes: list[str]) -> str:
        """Seal and rename a staged folder and prune older ones; returns what went wrong."""
        final = writing.staged.with_suffix("")
        try:
            known = {shard_name(rank, self.ranks): one for rank, one in enumerate(hashes)}
            missing = [name for name in known if not (writing.staged / name).is_file()]
            if missing:
                return f"{missing[0]} is not there; out_dir must be a folder that all nodes share"
            seal(writing.staged, known)
            self._abandon(writing.step)
            publish(writing.staged, final)
        except (OSError, UserError) as error:
            return f"{type(error).__name__}: {error}"
        self._sealed.add(final)
        self._prune()
        return ""

    def _abandon(self, step: int) -> None:
        """Rename what an abandoned continuation of this run left at later steps, so that `latest` passes over it."""
        for number, path in steps_in(self.out_dir):
            foreign = self.resumed_step is not None and number > self.resumed_step and path not in self._sealed
            if number >= step or foreign:
                name = path.with_name(f"{path.name}.abandoned")
                for again in range(2, sys.maxsize):
                    if not name.exists():
                        break
                    name = path.with_name(f"{path.name}.abandoned-{again}")
                path.rename(name)
                self._warn(f"{path}: not of this run's past; renamed to {name.name}, delete it when you like")

    def _prune(self) -> None:
        """Delete the checkpoints older than the newest `keep` that verify."""
        good = 0
        for _, path in steps_in(self.out_dir):
            if good >= self.keep:
                discarded = path.rename(path.with_name(f"{path.name}.discarded"))  # never half a checkpoint by its name
                shutil.rmtree(discarded, ignore_errors=True)
            elif path in self._sealed or refusal(path) is None:
                self._sealed.add(path)
                good += 1


def write_small_files(folder: Path, record: Mapping[str, Any], files: Mapping[str, str | Path]) -> None:
    """Write `progress.json` and the caller's files into a staged folder, fsynced."""
    (folder / PROGRESS).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name, content in files.items():
        if isinstance(content, Path):
            shutil.copyfile(content, folder / name)
        else:
            (folder / name).write_text(content, encoding="utf-8")
    for name in (PROGRESS, *files):
        sync_file(folder / name)


def refusal(folder: Path) -> str | None:
    """Why a checkpoint folder cannot be trusted, naming the file; None if it can."""
    try:
        verify(folder)
    except (UserError, OSError) as error:
        return str(error)
    return None


def newest_that_verifies(out_dir: Path, warn: Warn) -> int:
    """The step of the newest checkpoint whose every file is as it was written; -1 if there is none."""
    for step, path in steps_in(out_dir):
        reason = refusal(path)
        if reason is None:
            return step
        warn(f"{path.name} refused: {reason}; looking for an older checkpoint")
    return -1


def latest(out_dir: Path | str, warn: Warn = say, *, group: Group = None) -> Path | None:
    """The newest checkpoint of a run that verifies, None without one; every rank calls it, the first one hashes."""
    rank, _ = place_of(group)
    mine = newest_that_verifies(Path(out_dir), warn) if rank == 0 else -1
    step = int(agree(str(mine) if rank == 0 else "", group))
    return dict(steps_in(Path(out_dir)))[step] if step >= 0 else None


def find(resume: bool | str | Path, out_dir: Path | str, warn: Warn = say, *, group: Group = None) -> Path | None:
    """The checkpoint that a recipe's `resume` asks for: false, true, "auto", or a folder. None: start afresh.

    Raises:
        UserError: if `resume` is true and there is none, or the folder is not a checkpoint or is damaged.
    """
    if resume is False or resume is None:
        return None
    if resume is True or resume == "auto":
        folder = latest(out_dir, warn, group=group)
        if folder is None and resume is True:
            raise UserError(f"resume: true, but {out_dir} holds no checkpoint; use resume: auto to start without one")
        return folder
    folder = Path(resume)
    rank, _ = place_of(group)
    reason = None
    if rank == 0:
        reason = refusal(folder) if folder.is_dir() else f"{folder}: no such folder"
    error = agree(reason or "", group)
    if error:
        raise UserError(f"resume: {error}; name a step folder of a run, or use resume: auto")
    return folder


def open_shards(folder: Path) -> TensorFiles:
    """The tensors of a checkpoint, read from the files that its manifest names."""
    names = read_json(folder / MANIFEST)["files"]
    shards = sorted(name for name in names if re.fullmatch(r"shard-\d{5}-of-\d{5}\.safetensors", name))
    if not shards:
        raise Damaged(f"{folder}: holds no shard-*.safetensors")
    return TensorFiles(folder / name for name in shards)


@torch.no_grad()
def load(
    folder: Path | str,
    model: nn.Module,
    optimizer: Optimizers = None,
    *,
    restore_rng: bool = True,
    kept: Collection[str] | None = None,
    group: Group = None,
    warn: Warn = say,
) -> dict[str, Any]:
    """Bring a model and its optimizers to where a checkpoint was taken, under any layout; returns its progress.

    The folder is taken to be verified (`latest` and `find` do that). Every rank reads only the values that it holds.

    Args:
        kept: as `Checkpoints` was given; the model's other tensors stay as they are.

    Raises:
        UserError: if the checkpoint is of another model, precision or optimizer.
    """
    folder = Path(folder)
    progress: dict[str, Any] = read_json(folder / PROGRESS)
    files = open_shards(folder)
    restore_model(model, files, folder.name, kept)
    optimizers = listed(optimizer)
    if optimizers:
        restore_groups(model, optimizers, progress["groups"])
        restore_optimizer(model, optimizers, files, folder.name)
    rank, ranks = place_of(group)
    if restore_rng and ranks == progress["ranks"]:
        restore_generators(files, rank)
    elif restore_rng and rank == 0:
        warn(f"{folder.name}: saved by {progress['ranks']} ranks, loaded by {ranks}; random generators start afresh")
    return progress


def step_folder(folder: Path) -> Path | None:
    """The training checkpoint that a folder is, or the newest good one in it; None if it is of another kind.

    Raises:
        UserError: naming a damaged file, if `folder` itself is a checkpoint that does not verify.
    """
    if (folder / MANIFEST).is_file() or (folder / PROGRESS).is_file():
        verify(folder)
        return folder
    return latest(folder)


def model_tensors_of(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The weights in a training checkpoint, whole, one at a time."""
    files = open_shards(folder)
    for name in files.wholes:
        if name.startswith("model."):
            yield name.removeprefix("model."), files.whole(name)
