"""Scores of answers by the content of the answers, in memory and in a folder.

A folder has scores.safetensors (`keys` (N, 16) uint8, hashes of the answers, and `scores` (N,) float64) and
manifest.json.
"""

import hashlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from litgpt.data.stream.batch import IGNORE, Batch
from litgpt.errors import UserError
from litgpt.files import MANIFEST, lock_folder, staged_folder, verify_manifest, write_manifest
from litgpt.model.media import Media
from litgpt.store.safetensors_files import SafetensorsFiles, write_tensors

KEY_BYTES = 16
FILE = "scores.safetensors"


def hash_answers(batch: Batch) -> list[bytes | None]:
    """A key of each answer: a hash of its tokens, labels, media and what its score depends on; None without labels."""
    assert batch.answers is not None and batch.answer_values is not None
    numbers = batch.answers.flatten().cpu().numpy()
    order = np.argsort(numbers, kind="stable")  # the tokens of each answer follow each other, in their order
    starts = np.searchsorted(numbers[order], np.arange(int(numbers.max()) + 2))
    labels = batch.labels.flatten().cpu().numpy()
    weights = np.ones(len(labels)) if batch.weights is None else batch.weights.flatten().cpu().numpy()
    columns = [batch.ids.flatten().cpu().numpy().astype("<i8"), labels.astype("<i8"), weights.astype("<f4")]
    ends = batch.answer_values.get("shared_end")
    media = hash_media(batch.media, int(numbers.max()) + 1)
    keys: list[bytes | None] = []
    for answer, (start, stop) in enumerate(pairwise(starts)):
        tokens = order[start:stop]
        content = b"".join(column[tokens].tobytes() for column in columns)
        content += b"" if ends is None else str(int(ends[answer])).encode()
        content += media[answer]
        has_labels = bool((labels[tokens] != IGNORE).any())
        keys.append(hashlib.sha256(content).digest()[:KEY_BYTES] if has_labels else None)
    return keys


def hash_media(media: Media | None, answers: int) -> list[bytes]:
    """Hashes of the images, then of the sounds, of each answer."""
    if media is None:
        return [b""] * answers
    images = [hash_values(*each) for each in zip(media.grids, media.split_patches(), strict=True)]
    hashes = [b"".join(images[number] for number in media.list_images(answer)) for answer in range(answers)]
    if (given := media.sounds) is None:
        return hashes
    sounds = [hash_values(*each) for each in zip(given.lengths, given.split_frames(), strict=True)]
    return [
        each + b"".join(sounds[number] for number in given.list_sounds(answer)) for answer, each in enumerate(hashes)
    ]


def hash_values(size: Any, values: Tensor) -> bytes:
    """A hash of the size and the patches or frames of a medium."""
    return hashlib.sha256(str(size).encode() + values.cpu().numpy().tobytes()).digest()


class StoredScores:
    """Scores by the keys of answers."""

    def __init__(self) -> None:
        self.values: dict[bytes, float] = {}

    def add_to(self, batch: Batch) -> Batch:
        """Add `reference` to the values of the answers of a batch, 0 for answers without labels.

        Raises:
            UserError: if the score of an answer is not stored.
        """
        keys = hash_answers(batch)
        if not all(key is None or key in self.values for key in keys):
            raise UserError(
                "preference.precompute_ref_log_probs: the data has an answer that it did not have when the run began; "
                "start a new run, or set preference.precompute_ref_log_probs: false"
            )
        scores = [0.0 if key is None else self.values[key] for key in keys]
        values = torch.tensor(scores, dtype=torch.float64).to(batch.ids.device)
        return replace(batch, answer_values={**(batch.answer_values or {}), "reference": values})

    def read(self, folder: Path) -> None:
        """Add the scores in a folder; nothing if it does not exist.

        Raises:
            DamagedFileError: if a file is damaged.
        """
        if not (folder / MANIFEST).is_file():
            return
        verify_manifest(folder)
        files = SafetensorsFiles([folder / FILE])
        keys, scores = files.read("keys").numpy(), files.read("scores").tolist()
        self.values |= {key.tobytes(): score for key, score in zip(keys, scores, strict=True)}

    def write(self, folder: Path) -> None:
        """Write all scores into a folder, which is replaced as a whole.

        Raises:
            UserError: if it cannot be written.
        """
        keys = np.frombuffer(b"".join(self.values), np.uint8).reshape(-1, KEY_BYTES)
        scores = torch.tensor(list(self.values.values()), dtype=torch.float64)
        try:
            with lock_folder(folder.parent), staged_folder(folder, replace=True) as staged:
                write_tensors(staged / FILE, {"keys": torch.from_numpy(keys.copy()), "scores": scores}, {})
                write_manifest(staged)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"data.cache_dir: {folder}: {reason}; fix that, or set another data.cache_dir") from None
