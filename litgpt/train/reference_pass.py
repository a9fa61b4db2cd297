"""Log-probabilities of the reference, computed in one pass over the data of a run before its first step."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from litgpt.data.stream.batch import Batch
from litgpt.errors import UserError
from litgpt.files import DamagedFileError, read_json_object, write_json
from litgpt.model.registry import LABELS
from litgpt.parallel.reduce import all_gather_objects, all_reduce_sum
from litgpt.parallel.strategy import is_rank_zero
from litgpt.phases import phase
from litgpt.store.collectives_io import raise_on_all_ranks, warn_once
from litgpt.train.answer_scores import AnswerScorer
from litgpt.train.reference import hash_parameters
from litgpt.train.run_spec import check_token_range
from litgpt.train.setup import Run
from litgpt.train.stored_scores import StoredScores, hash_answers

SAVE_INTERVAL = 1000
"""Number of micro-batches of each rank after which scores are saved, so that a run that is killed keeps them."""
RECORD = "reference.json"
"""The file in `out_dir` with the identity of the reference."""


def store_reference_scores(run: Run, scorer: AnswerScorer) -> None:
    """Compute the scores of the reference for all answers of a run, if its settings say so, and drop the reference.

    Scores are kept in the data's cache folder, by the content of the answer and the identity of the reference, and read
    from there by later runs. All ranks call this together.

    Raises:
        UserError: if the size of the data is unknown, or a resumed run has another reference than it had.
    """
    train_state = run.train_state
    if not run.spec.scores_ahead:
        return
    assert train_state.reference is not None
    cache, position = find_cache(run), run.data.train.state_dict()
    with train_state.reference.applied(train_state.core):
        identity = identify_reference(run, scorer)
        check_identity(run, identity)
        folder = cache / "reference" / identity[:20]
        scores = read_scores(folder)
        stored = saved = len(scores.values)
        for name, batches, rounds in list_batches(run):
            with phase(f"computing log-probabilities of the reference: {name}", rounds) as entry:
                for number, batch in enumerate(islice(batches, rounds), start=1):
                    entry.advance()
                    add_scores(run, scorer, scores, check_token_range(batch, run.spec))
                    if number % SAVE_INTERVAL == 0:
                        saved = save_scores(scores, folder, saved)
        run.data.train.close()
        run.data.train.load_state_dict(position)
    computed = save_scores(scores, folder, saved) - stored
    warn_once(f"log-probabilities of the reference: {computed:,} computed, {stored:,} read from {folder}")
    train_state.reference, train_state.reference_scores = None, scores


def count_rounds(run: Run) -> int:
    """The number of micro-batches of each rank in which every answer of the run occurs: at most two epochs."""
    samples, position = run.data.train.samples_per_epoch, run.data.train.position
    if samples is None:
        raise UserError(
            "preference.precompute_ref_log_probs: true needs data of a known size; set false, or data.streaming: false"
        )
    epoch = -(-samples // (run.recipe.train.micro_batch_size * run.data.ranks))
    limit = epoch if position % samples == 0 else 2 * epoch  # the second of which is a whole one
    if run.steps is None:
        return limit
    return min(limit, (run.steps - run.progress.get("step", 0)) * run.data.micro_batches)


def list_batches(run: Run) -> Iterator[tuple[str, Iterable[Batch], int | None]]:
    """The micro-batches of this rank in training and in validation: a name, the batches, and how many of them."""
    yield "training", run.data.train, count_rounds(run)
    if run.data.validation is not None:
        limit = run.recipe.eval.max_iters
        yield "validation", run.data.validation, None if limit is None else -(-limit // run.data.ranks)


def find_cache(run: Run) -> Path:
    """The folder of the data for what is computed from it.

    Raises:
        UserError: if the data module has none.
    """
    find_folder = getattr(run.spec.data, "cache_folder", None)
    if find_folder is None:
        raise UserError(
            f"preference.precompute_ref_log_probs: true is not supported with data: {type(run.spec.data).__name__}, "
            "which has no cache folder; set false, or use data: Preferences"
        )
    return find_folder()


def add_scores(run: Run, scorer: AnswerScorer, scores: StoredScores, batch: Batch) -> None:
    """Compute the scores of a micro-batch of each rank, unless all of them are known on all ranks."""
    train_state = run.train_state
    keys = hash_answers(scorer.measure(batch))
    is_missing = any(key is not None and key not in scores.values for key in keys)
    if not all_reduce_sum([is_missing], train_state.device)[0]:
        return
    (values,) = scorer.score(train_state, [batch])
    if values is not None:  # on ranks with the last stage of a pipeline
        computed = zip(keys, values.tolist(), strict=True)
        scores.values |= {key: value for key, value in computed if key is not None and key not in scores.values}


def save_scores(scores: StoredScores, folder: Path, saved: int) -> int:
    """Give all ranks the scores of each, and write them; returns the number of scores.

    Args:
        saved: the number of the first scores that were given to all ranks before.
    """
    for items in all_gather_objects(list(scores.values.items())[saved:]):
        scores.values |= dict(items)
    with raise_on_all_ranks():
        if is_rank_zero() and len(scores.values) > saved:
            scores.write(folder)
    return len(scores.values)


def read_scores(folder: Path) -> StoredScores:
    """The scores in a folder; none if it is damaged, which a line on standard error says."""
    scores = StoredScores()
    try:
        scores.read(folder)
    except DamagedFileError as error:
        warn_once(f"{error}; the log-probabilities of the reference are computed again")
    return scores


def identify_reference(run: Run, scorer: AnswerScorer) -> str:
    """A hash of what scores depend on besides the answers: the weights, which are those of the model, and settings."""
    spec = run.spec
    config = {name: value for name, value in spec.config.to_dict().items() if name not in LABELS}
    settings = [config, type(spec.tuner).__name__, getattr(spec.tuner, "scale", None), run.recipe.precision]
    content = [hash_parameters(run.train_state.core), settings, scorer.ld_alpha]
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()


def check_identity(run: Run, identity: str) -> None:
    """Check that a resumed run has the reference that it began with, and record that of a new run."""
    path = run.recipe.out_dir / RECORD
    with raise_on_all_ranks():
        if run.progress and (first := read_json_object(path).get("identity")) not in (None, identity):
            raise UserError(
                f"{path}: the run began with the reference {str(first)[:12]}, and its initial weights now give "
                f"{identity[:12]}; restore the files of checkpoint_dir and preference.reference, or start a new run"
            )
        if is_rank_zero():
            write_json(path, {"identity": identity})
