"""Save training checkpoints: sharded, in the background, and atomically.

A checkpoint is a folder `step-00000008` with one safetensors file a rank (`shard-00000-of-00002.safetensors`: weights,
optimizer state, a reference model if there is one and random generators, each block with its offset in the full
tensor), `progress.json`, the files that the caller adds, and `manifest.json` (bytes and SHA-256 of every other file),
written last. It is staged in `step-00000008.partial` and then renamed.
"""

import json
import shutil
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, count
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from litgpt.errors import UserError
from litgpt.files import publish_folder, sync_file, write_manifest
from litgpt.messages import print_message
from litgpt.store import collectives_io, state_dict
from litgpt.store.checkpoint_load import PROGRESS, find_damage
from litgpt.store.collectives_io import StageRanks, Warn, share_first_message
from litgpt.store.safetensors_files import write_tensors
from litgpt.store.step_folders import get_step_folder, list_checkpoints
from litgpt.store.uploads import Uploads

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
    """A thread that writes one rank's shard of a checkpoint, and the shard's SHA-256 or the error once it ends."""

    def __init__(self, step: int, staged: Path, write: Callable[[], str], *, is_best: bool = False) -> None:
        """Start the thread.

        Args:
            staged: the folder of all ranks' shards until the commit.
            write: writes the shard and returns its SHA-256.
            is_best: whether the checkpoint is the best one once it is committed.
        """
        self.step = step
        self.staged = staged
        self.is_best = is_best
        self.sha256 = ""
        self.error = ""
        self.thread = threading.Thread(target=self._run, args=(write,), name="checkpoint", daemon=True)
        self.thread.start()

    def _run(self, write: Callable[[], str]) -> None:
        try:
            self.sha256 = write()
        except Exception as error:  # of any type: all ranks raise it at the commit
            self.error = " ".join(f"{type(error).__name__}: {error}".split())


@dataclass
class Checkpoints:
    """The checkpoints of one run: saved, committed by all ranks together, and pruned.

    `save` and `commit` are called by every rank at the same step. `save` copies the values, so training may continue
    when it returns, unless it is the last one. The folder appears at `commit`, which waits for the thread unless
    `is_written` on all ranks. Folders that a killed run left half written are removed at the start.

    Attributes:
        keep: the number of checkpoints that verify to keep; older ones are deleted once a newer one is in place.
        best_step: the step of the best checkpoint, which is kept besides these; None for none.
        asynchronous: write in a thread, from a copy in host memory (as large as the weights and moments of a rank).
        save_optimizer: write the optimizer state and the parameter groups.
        on_error: whether a failed save ends the run with a `UserError`, or only warns.
        resumed_step: the step this run begins at, if known: later steps are of an abandoned run.
        saved_names: names of the model's tensors that are written, if the others never change; None for all.
        reference: other values of the model's parameters, by name: local tensors for `load_reference` to return.
        layout: degrees of parallelism, for the record: random generators are restored only under the same.
        warn: called on rank 0 with one line.
        uploads: destinations of each checkpoint; empty on ranks other than the first.
    """

    out_dir: Path
    _: KW_ONLY
    keep: int = 2
    best_step: int | None = None
    asynchronous: bool = True
    on_error: Literal["stop", "continue"] = "stop"
    save_rng: bool = True
    save_optimizer: bool = True
    resumed_step: int | None = None
    saved_names: Collection[str] | None = None
    reference: Mapping[str, Tensor] = field(default_factory=dict)
    layout: Mapping[str, int] | None = None
    warn: Warn = print_message
    uploads: Sequence[Uploads] = ()

    def __post_init__(self) -> None:
        self.rank, self.ranks = collectives_io.get_rank(), collectives_io.get_world_size()
        self._writing: ShardWrite | None = None
        self._committed_step: int | None = None
        self._verified: set[Path] = set()  # written or verified by this process, so not hashed again to prune
        if self.rank == 0:
            for path in sorted([*self.out_dir.glob("step-*.partial"), *self.out_dir.glob("step-*.discarded")]):
                self.warn(f"{path}: left by a run that died while writing or deleting it; removed")
                shutil.rmtree(path, ignore_errors=True)
        share_first_message("")  # no rank stages before the old folders are removed

    @property
    def is_pending(self) -> bool:
        """Whether a save waits for its commit; the same on every rank."""
        return self._writing is not None

    @property
    def is_written(self) -> bool:
        """Whether this rank has nothing left to write."""
        return self._writing is None or not self._writing.thread.is_alive()

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: state_dict.Optimizers,
        progress: Mapping[str, Any],
        files: Mapping[str, str | Path] | None = None,
        *,
        is_best: bool = False,
        is_last: bool = False,
    ) -> None:
        """Start to write a checkpoint, after committing a pending one; a step that is already saved is skipped.

        Args:
            progress: JSON values that the run needs to resume.
            files: further files by name: their text, or a path to copy.
            is_best: whether to keep this checkpoint, instead of the best one until now.
            is_last: whether no value changes before the commit, so that none is copied.
        """
        if self._writing is not None and self._writing.step == step:
            return
        self.commit()
        final = get_step_folder(self.out_dir, step)
        if step in (self._committed_step, self.resumed_step) and final.exists():
            self.best_step = step if is_best else self.best_step
            return  # the same state is saved already
        staged = final.with_name(f"{final.name}.partial")
        optimizers = state_dict.list_optimizers(optimizer) if self.save_optimizer else []
        tensors, blocks, groups = self._copy_state(model, optimizers, copy=self.asynchronous and not is_last)
        record = {**progress, "step": step, "ranks": self.ranks, "layout": self.layout}
        record |= {"libraries": get_library_versions(), "groups": groups}

        def write() -> str:
            staged.mkdir(parents=True, exist_ok=True)
            if self.rank == 0:
                write_small_files(staged, record, files or {})
            path = staged / get_shard_name(self.rank, self.ranks)
            return write_tensors(path, tensors, {"format": "pt", "parts": json.dumps(blocks)})

        self._writing = ShardWrite(step, staged, write, is_best=is_best)
        if not self.asynchronous:
            self._writing.thread.join()

    def _copy_state(
        self, model: nn.Module, optimizers: list[Any], *, copy: bool
    ) -> tuple[dict[str, Tensor], dict[str, Any], list[dict[str, Any]]]:
        """This rank's tensors in host memory, their blocks, and the parameter groups of all ranks."""
        model_tensors = state_dict.iter_model_tensors(model, self.saved_names)
        state: dict[str, Any] = {f"model.{name}": value for name, value in model_tensors}
        state |= {f"optimizer.{name}": value for name, value in state_dict.iter_optimizer_state(model, optimizers)}
        reference = state_dict.iter_reference(model, self.reference)
        state |= {f"{state_dict.REFERENCE}{name}": shard for name, shard in reference}
        stage_ranks = StageRanks(state)
        stages = stage_ranks.all_gather_object((list(state), state_dict.list_param_groups(model, optimizers)))
        # an earlier stage writes a tied embedding, which two stages hold
        saved_before = {name for names, _ in stages[: stage_ranks.stage] for name in names}
        unsaved = ((name, value) for name, value in state.items() if name not in saved_before)
        tensors, blocks = {}, {}
        for name, local, block in state_dict.select_shards(unsaved, stage_ranks.rank, stage_ranks.size):
            # the optimizer changes its tensors in place, so a thread needs a copy of its own
            tensors[name] = local.detach().to("cpu", copy=copy)
            blocks[name] = block
        if self.save_rng:
            prefix, states = f"{state_dict.RNG}{self.rank:05d}", state_dict.get_rng_states()
            tensors |= {f"{prefix}.{device}": rng for device, rng in states.items()}
        return tensors, blocks, state_dict.merge_param_groups(groups for _, groups in stages)

    def commit(self) -> Path | None:
        """Wait for the writing threads and publish the checkpoint; returns its folder, None if nothing was saved.

        Raises:
            UserError: on every rank, if any rank failed to write and `on_error` is "stop".
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return None
        writing.thread.join()
        error = share_first_message(f"rank {self.rank}: {writing.error}" if writing.error else "")
        hashes = collectives_io.all_gather_bytes(writing.sha256.encode().ljust(64))
        final = writing.staged.with_suffix("")
        if self.rank == 0 and not error:
            error = self._publish(writing, [sha256.decode() for sha256 in hashes])
        if not (error := share_first_message(error)):
            self._committed_step = writing.step
            return final
        message = f"{final}: not saved ({error}); the older checkpoints are intact"
        if self.rank == 0:
            shutil.rmtree(writing.staged, ignore_errors=True)
            if self.on_error == "continue":
                self.warn(message)
        if self.on_error == "stop":
            raise UserError(f"{message}; free space or set checkpoint.on_error: continue")
        return None

    def finish_uploads(self) -> None:
        """Wait for all uploads, on the first rank, and delete the checkpoints that were kept for them."""
        for uploads in self.uploads:
            uploads.finish()
        if self.uploads:
            self._prune()

    def _publish(self, writing: ShardWrite, hashes: list[str]) -> str:
        """Write the manifest, rename the staged folder and prune older ones; returns an error message, or ""."""
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
        self.best_step = writing.step if writing.is_best else self.best_step
        for uploads in self.uploads:
            uploads.add(final)
        self._prune()
        return ""

    def _rename_abandoned(self, step: int) -> None:
        """Rename later steps of an abandoned continuation of this run, so that `find_latest` skips them."""
        for saved_step, path in list_checkpoints(self.out_dir):
            is_foreign = self.resumed_step is not None and saved_step > self.resumed_step and path not in self._verified
            if saved_step >= step or is_foreign:
                suffixes = chain(["abandoned"], (f"abandoned-{number}" for number in count(2)))
                targets = (path.with_name(f"{path.name}.{suffix}") for suffix in suffixes)
                target = path.rename(next(target for target in targets if not target.exists()))
                self.warn(f"{path}: not of this run's past; renamed to {target.name}, delete it if you do not need it")

    def _prune(self) -> None:
        """Delete the checkpoints older than the newest `keep` that verify, except the best one."""
        verified = 0
        for step, path in list_checkpoints(self.out_dir):
            if verified >= self.keep and step == self.best_step:
                continue
            if verified >= self.keep:
                if not all([uploads.release(path) for uploads in self.uploads]):
                    continue  # deleted after a later save
                # renamed first, so that a partly deleted folder is not taken for a checkpoint
                discarded = path.rename(path.with_name(f"{path.name}.discarded"))
                shutil.rmtree(discarded, ignore_errors=True)
            elif path in self._verified or find_damage(path) is None:
                self._verified.add(path)
                verified += 1


def write_small_files(folder: Path, record: Mapping[str, Any], files: Mapping[str, str | Path]) -> None:
    """Write `progress.json` and the caller's files into a staged folder, fsynced."""
    (folder / PROGRESS).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        if isinstance(content, Path):
            shutil.copyfile(content, folder / name)
        else:
            (folder / name).write_text(content, encoding="utf-8")
    for name in (PROGRESS, *files):
        sync_file(folder / name)
