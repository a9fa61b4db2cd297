"""Find the samples of some rows in the cache, or build them."""

from dataclasses import asdict
from pathlib import Path
from typing import Literal

from litgpt.data.cache.examples import EXAMPLES_FORMAT, CachedExamples, build_examples
from litgpt.data.cache.folders import build_once, hash_key
from litgpt.data.cache.lazy_examples import LazyExamples, build_lazy_examples
from litgpt.data.read.row_sets import OnError, RowSet, bad_row_error
from litgpt.data.render.example import Renderer
from litgpt.errors import UserError


def prepare_examples(
    rows: RowSet, renderer: Renderer, cache: Path, on_error: OnError, tokenize: Literal["ahead", "lazy"] = "ahead"
) -> CachedExamples:
    """Open the samples of the rows in `cache`; builds them first if they are missing.

    Two processes may call it at once; the second waits for the first.

    Args:
        on_error: for invalid rows: raise; or else count them.
        tokenize: ahead, or lazily when samples are read.

    Raises:
        UserError: for an invalid row under `raise`, if no row is left, or if the cache cannot be written.
    """
    build = build_examples if tokenize == "ahead" else build_lazy_examples
    sources = [asdict(source) for source in rows.sources]
    key = [tokenize, sources, rows.settings, renderer.fingerprint_parts(), rows.channel]
    place = [str(rows.media_dir)] if renderer.reads_media else []  # of the files that rows name
    folder = build_once(cache, [EXAMPLES_FORMAT, *key, *place], lambda staged: build(rows, renderer, staged, on_error))
    examples = CachedExamples(folder) if tokenize == "ahead" else LazyExamples(folder, renderer, on_error)
    examples.fingerprint = hash_key([1, *key])  # the first format's, so that checkpoints of all formats resume
    report = examples.report
    if report.left_out and on_error == "raise":
        raise bad_row_error(report.first[0])
    if examples.count == 0:
        reason = f"the first error: {report.first[0]}" if report.first else "it is empty"
        raise UserError(f"data: {rows.name} has no row to train on; {reason}")
    return examples
