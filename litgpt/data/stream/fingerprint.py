"""Fingerprints of the data that a stream reads, saved in checkpoints."""

import hashlib
from typing import Any

from litgpt.errors import UserError


def compute_fingerprint(*parts: Any) -> str:
    """Hash everything that decides which samples a stream yields."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def check_position(state: dict[str, Any], fingerprint: str) -> int:
    """Return the position in a stream's state after checking that it belongs to the data with this fingerprint.

    Raises:
        UserError: if it does not, or is not a state.
    """
    position = state.get("position")
    if not isinstance(position, int) or isinstance(position, bool) or position < 0:
        raise UserError(f"data: {str(state)[:80]} is not the state of a data stream")
    if state.get("fingerprint") != fingerprint:
        raise UserError(
            f"data: the checkpoint was at sample {position} of another data set ({state.get('fingerprint')}, now "
            f"{fingerprint}): the text, the tokenizer, train.max_seq_length or data.seed changed; restore it, or "
            "start a new run in another out_dir"
        )
    return position
