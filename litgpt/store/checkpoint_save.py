"""Training checkpoints: written sharded in the background, there whole or not at all, read under any layout.

A checkpoint is a folder `step-00000008` with one safetensors file a rank (`shard-00000-of-00002.safetensors`: weights,
optimizer state and random generators, each block with its place in the whole tensor), `progress.json`, the files that
the caller adds, and `manifest.json` (bytes and SHA-256 of every other file), written last. It is staged in
`step-00000008.partial` and appears by one rename.
"""

import json
import shutil
import sys
import threading
from collections.abc import Callable, Collection, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from litgpt.errors import UserError
from litgpt.files import publish_folder, sync_file, write_manifest
from litgpt.store.checkpoint_load import PROGRESS, list_checkpoints, refusal
from litgpt.store.collectives_io import (
    Group,
    StageRanks,
    Warn,
    all_gather_bytes,
    get_rank_and_size,
    print_to_stderr,
    share_first_message,
)
from litgpt.store.safetensors_files import write_tensors
from litgpt.store.state_dict import (
    Optimizers,
    get_rng_states,
    iter_model_tensors,
    iter_optimizer_state,
    list_optimizers,
    merge_param_groups,
    read_param_groups,
    select_owned,
)

LIBRARIES = ("litgpt", "torch", "lightning", "safetensors")


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
        layout: Mapping[str, int] | None = None,
        group: Group = None,
        warn: Warn = print_to_stderr,
    ) -> None:
        """Clear away what a dead run left half written.

        Args:
            keep: how many checkpoints that verify stay; older ones are deleted once a newer one is in place.
            asynchronous: write in a thread, from a copy in host memory (as large as the weights and moments of a rank).
            on_error: what a failed save does: end the run with a `UserError`, or say so and go on.
            resumed_step: the step this run begins at, if known: later steps are of an abandoned run.
            kept: names of the model's tensors that are written, where the others never change; None for all.
            layout: how ranks share work, for the record: random generators are restored under the same alone.
            warn: called on rank 0 with one line.
        """
        self.out_dir = Path(out_dir)
        self.keep = keep
        self.asynchronous = asynchronous
        self.on_error = on_error
        self.save_rng = save_rng
        self.resumed_step = resumed_step
        self.kept = kept
        self.layout = None if layout is None else dict(layout)
        self.group = group
        self.rank, self.ranks = get_rank_and_size(group)
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
        share_first_message("", self.group)  # nobody stages before the old is gone

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
        tensors, places, groups = self._snapshot(model, list_optimizers(optimizer))
        record: dict[str, Any] = {
            **progress,
            "step": step,
            "ranks": self.ranks,
            "layout": self.layout,
            "libraries": library_versions(),
            "groups": groups,
        }

        def work() -> dict[str, str]:
            staged.mkdir(parents=True, exist_ok=True)
            if self.rank == 0:
                write_small_files(staged, record, files or {})
            name = shard_name(self.rank, self.ranks)
            return {name: write_tensors(staged / name, tensors, {"format": "pt", "parts": json.dumps(places)})}

        self._writing = Write(step, staged, work, background=self.asynchronous)

    def _snapshot(
        self, model: nn.Module, optimizers: list[Any]
    ) -> tuple[dict[str, Tensor], dict[str, Any], list[dict[str, Any]]]:
        """What this rank writes: its tensors in host memory, and their places in the whole ones; and all groups."""
        held: dict[str, Any] = {f"model.{name}": tensor for name, tensor in iter_model_tensors(model, self.kept)}
        held |= {f"optimizer.{name}": value for name, value in iter_optimizer_state(model, optimizers)}
        peers = StageRanks(held, self.group)
        stages = peers.told((list(held), read_param_groups(model, optimizers)))
        earlier = {name for names, _ in stages[: peers.stage] for name in names}  # a tied embedding lies on two
        mine = ((name, value) for name, value in held.items() if name not in earlier)
        tensors, places = {}, {}
        for name, local, place in select_owned(mine, peers.place, peers.number):
            # the optimizer changes its tensors in place, so a thread needs a copy of its own
            tensors[name] = local.detach().to("cpu", copy=self.asynchronous)
            places[name] = place
        if self.save_rng:
            tensors |= {f"rng.{self.rank:05d}.{kind}": state for kind, state in get_rng_states().items()}
        return tensors, places, merge_param_groups(groups for _, groups in stages)

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
        error = share_first_message(f"rank {self.rank}: {writing.error}" if writing.error else "", self.group)
        hashes = all_gather_bytes("".join(writing.hashes.values()).encode().ljust(64), self.group)
        final = writing.staged.with_suffix("")
        if self.rank == 0 and not error:
            error = self._publish(writing, [one.decode() for one in hashes])
        error = share_first_message(error, self.group)
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
            write_manifest(writing.staged, known)
            self._abandon(writing.step)
            publish_folder(writing.staged, final)
        except (OSError, UserError) as error:
            return f"{type(error).__name__}: {error}"
        self._sealed.add(final)
        self._prune()
        return ""

    def _abandon(self, step: int) -> None:
        """Rename later steps of an abandoned continuation of this run, so that `find_latest` skips them."""
        for number, path in list_checkpoints(self.out_dir):
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
        for _, path in list_checkpoints(self.out_dir):
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
