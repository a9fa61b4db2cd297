"""Save training checkpoints: sharded, written in the background, and visible whole or not at all.

A checkpoint is a folder `step-00000008` with one safetensors file a rank (`shard-00000-of-00002.safetensors`: weights,
optimizer state and random generators, each block with its offset in the full tensor), `progress.json`, the files that
the caller adds, and `manifest.json` (bytes and SHA-256 of every other file), written last. It is staged in
`step-00000008.partial` and appears by one rename.
"""

import json
import shutil
import threading
from collections.abc import Callable, Collection, Mapping
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, count
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from litgpt.errors import UserError
from litgpt.files import publish_folder, sync_file, write_manifest
from litgpt.store.checkpoint_load import PROGRESS, find_damage, list_checkpoints
from litgpt.store.collectives_io import (
    Group,
    StageRanks,
    Warn,
    all_gather_bytes,
    get_rank_and_size,
    print_warning,
    share_first_message,
)
from litgpt.store.optimizer_state import (
    Optimizers,
    iter_optimizer_state,
    list_optimizers,
    list_param_groups,
    merge_param_groups,
)
from litgpt.store.safetensors_files import write_tensors
from litgpt.store.state_dict import get_rng_states, iter_model_tensors, select_shards

LIBRARIES = ("litgpt", "torch", "lightning", "safetensors")


def get_shard_name(rank: int, ranks: int) -> str:
    """The name of one rank's tensor file."""
    return f"shard-{rank:05d}-of-{ranks:05d}.safetensors"


def get_library_versions() -> dict[str, str]:
    """The versions of the libraries that a run depends on, for the record."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "unknown"
    return versions


class ShardWrite:
    """The writing of one rank's shard of one checkpoint: a thread, then a hash or an error."""

    def __init__(self, step: int, staged: Path, write: Callable[[], str], *, background: bool) -> None:
        """Start to write.

        Args:
            staged: the folder of all ranks' shards until the commit.
            write: writes the shard and returns its SHA-256.
        """
        self.step = step
        self.staged = staged
        self.sha256 = ""
        self.error = ""
        self._write = write
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True) if background else None
        if self._thread is None:
            self._run()
        else:
            self._thread.start()

    def _run(self) -> None:
        try:
            self.sha256 = self._write()
        except Exception as error:  # whatever it is, every rank must know of it at the commit
            self.error = " ".join(f"{type(error).__name__}: {error}".split())

    @property
    def is_done(self) -> bool:
        """Whether the shard is written, or has failed."""
        return self._thread is None or not self._thread.is_alive()

    def join(self) -> None:
        """Wait until it is done."""
        if self._thread is not None:
            self._thread.join()


class Checkpoints:
    """The checkpoints of one run: saved, committed by all ranks together, and pruned.

    `save` and `commit` are called by every rank at the same step. `save` copies the values, so training may continue
    when it returns. The folder appears at `commit`, which waits for the writing unless `is_written` on all ranks.
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
        saved_names: Collection[str] | None = None,
        layout: Mapping[str, int] | None = None,
        group: Group = None,
        warn: Warn = print_warning,
    ) -> None:
        """Remove what a run that died left half written.

        Args:
            keep: how many checkpoints that verify are kept; older ones are deleted once a newer one is in place.
            asynchronous: write in a thread, from a copy in host memory (as large as the weights and moments of a rank).
            on_error: whether a failed save ends the run with a `UserError`, or only warns.
            resumed_step: the step this run begins at, if known: later steps are of an abandoned run.
            saved_names: names of the model's tensors that are written, if the others never change; None for all.
            layout: degrees of parallelism, for the record: random generators are restored only under the same.
            warn: called on rank 0 with one line.
        """
        self.out_dir = Path(out_dir)
        self.keep = keep
        self.asynchronous = asynchronous
        self.on_error = on_error
        self.save_rng = save_rng
        self.resumed_step = resumed_step
        self.saved_names = saved_names
        self.layout = None if layout is None else dict(layout)
        self.group = group
        self.rank, self.ranks = get_rank_and_size(group)
        self._warn = warn
        self._writing: ShardWrite | None = None
        self._committed_step: int | None = None
        self._verified: set[Path] = set()  # written or verified by this process, so not hashed again to prune
        self._remove_stale()

    def _remove_stale(self) -> None:
        if self.rank == 0:
            for path in sorted([*self.out_dir.glob("step-*.partial"), *self.out_dir.glob("step-*.discarded")]):
                self._warn(f"{path}: left by a run that died while writing or deleting it; removed")
                shutil.rmtree(path, ignore_errors=True)
        share_first_message("", self.group)  # no rank stages before the old folders are removed

    @property
    def is_pending(self) -> bool:
        """Whether a save waits for its commit; the same on every rank."""
        return self._writing is not None

    @property
    def is_written(self) -> bool:
        """Whether this rank has nothing left to write."""
        return self._writing is None or self._writing.is_done

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: Optimizers,
        progress: Mapping[str, Any],
        files: Mapping[str, str | Path] | None = None,
    ) -> None:
        """Begin a checkpoint, after committing one that is pending; a step that is saved already is skipped.

        Args:
            progress: what else the run needs to resume; JSON.
            files: further files by name: their text, or a path to copy.
        """
        self.commit()
        final = self.out_dir / f"step-{step:08d}"
        if step in (self._committed_step, self.resumed_step) and final.exists():
            return  # the same state is saved already
        staged = final.with_name(f"{final.name}.partial")
        tensors, blocks, groups = self._copy_state(model, list_optimizers(optimizer))
        record: dict[str, Any] = {
            **progress,
            "step": step,
            "ranks": self.ranks,
            "layout": self.layout,
            "libraries": get_library_versions(),
            "groups": groups,
        }

        def write() -> str:
            staged.mkdir(parents=True, exist_ok=True)
            if self.rank == 0:
                write_small_files(staged, record, files or {})
            path = staged / get_shard_name(self.rank, self.ranks)
            return write_tensors(path, tensors, {"format": "pt", "parts": json.dumps(blocks)})

        self._writing = ShardWrite(step, staged, write, background=self.asynchronous)

    def _copy_state(
        self, model: nn.Module, optimizers: list[Any]
    ) -> tuple[dict[str, Tensor], dict[str, Any], list[dict[str, Any]]]:
        """What this rank writes: its tensors in host memory and their blocks; and the groups of all ranks."""
        state: dict[str, Any] = {f"model.{name}": value for name, value in iter_model_tensors(model, self.saved_names)}
        state |= {f"optimizer.{name}": value for name, value in iter_optimizer_state(model, optimizers)}
        stage_ranks = StageRanks(state, self.group)
        stages = stage_ranks.all_gather_object((list(state), list_param_groups(model, optimizers)))
        saved_before = {
            name for names, _ in stages[: stage_ranks.stage] for name in names
        }  # a tied embedding is on two
        unsaved = ((name, value) for name, value in state.items() if name not in saved_before)
        tensors, blocks = {}, {}
        for name, local, block in select_shards(unsaved, stage_ranks.rank, stage_ranks.size):
            # the optimizer changes its tensors in place, so a thread needs a copy of its own
            tensors[name] = local.detach().to("cpu", copy=self.asynchronous)
            blocks[name] = block
        if self.save_rng:
            tensors |= {f"rng.{self.rank:05d}.{device}": rng for device, rng in get_rng_states().items()}
        return tensors, blocks, merge_param_groups(groups for _, groups in stages)

    def commit(self) -> Path | None:
        """Wait for the writing and make the checkpoint appear; returns its folder, None if nothing was saved.

        Raises:
            UserError: on every rank, if any rank failed to write and `on_error` is "stop".
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return None
        writing.join()
        error = share_first_message(f"rank {self.rank}: {writing.error}" if writing.error else "", self.group)
        hashes = all_gather_bytes(writing.sha256.encode().ljust(64), self.group)
        final = writing.staged.with_suffix("")
        if self.rank == 0 and not error:
            error = self._publish(writing, [sha256.decode() for sha256 in hashes])
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

    def _publish(self, writing: ShardWrite, hashes: list[str]) -> str:
        """Write the manifest, rename the staged folder and prune older ones; returns an error, or an empty text."""
        final = writing.staged.with_suffix("")
        try:
            shards = {get_shard_name(rank, self.ranks): sha256 for rank, sha256 in enumerate(hashes)}
            missing = [name for name in shards if not (writing.staged / name).is_file()]
            if missing:
                return f"{missing[0]} is missing; out_dir must be a folder that all nodes share"
            write_manifest(writing.staged, shards)
            self._rename_abandoned(writing.step)
            publish_folder(writing.staged, final)
        except (OSError, UserError) as error:
            return f"{type(error).__name__}: {error}"
        self._verified.add(final)
        self._prune()
        return ""

    def _rename_abandoned(self, step: int) -> None:
        """Rename later steps of an abandoned continuation of this run, so that `find_latest` skips them."""
        for saved_step, path in list_checkpoints(self.out_dir):
            is_foreign = self.resumed_step is not None and saved_step > self.resumed_step and path not in self._verified
            if saved_step >= step or is_foreign:
                suffixes = chain(["abandoned"], (f"abandoned-{number}" for number in count(2)))
                names = (path.with_name(f"{path.name}.{suffix}") for suffix in suffixes)
                target = path.rename(next(name for name in names if not name.exists()))
                self._warn(f"{path}: not of this run's past; renamed to {target.name}, delete it if you do not need it")

    def _prune(self) -> None:
        """Delete the checkpoints older than the newest `keep` that verify."""
        verified = 0
        for _, path in list_checkpoints(self.out_dir):
            if verified >= self.keep:
                # renamed, so that a half deleted one is not taken for a checkpoint
                discarded = path.rename(path.with_name(f"{path.name}.discarded"))
                shutil.rmtree(discarded, ignore_errors=True)
            elif path in self._verified or find_damage(path) is None:
                self._verified.add(path)
                verified += 1


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
