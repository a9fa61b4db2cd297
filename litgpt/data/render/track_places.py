"""The tokens of a video with its sound: those of its frames and of its sound by turns, a few seconds of each."""

from collections.abc import Sequence
from itertools import zip_longest


def interleave(frames: Sequence[int], sound: Sequence[int], times: Sequence[float], chunk: int) -> list[int]:
    """The tokens of frames and of their sound, those of each chunk of positions of both one after the other.

    Args:
        times: the position in time of each token of the frames, ascending; that of one of the sound is its number.
        chunk: the length of a chunk.
    """
    of_sound = cut_chunks(sound, range(len(sound)), chunk)
    pairs = zip_longest(cut_chunks(frames, times, chunk), of_sound, fillvalue=())
    return [token for pair in pairs for part in pair for token in part]


def cut_chunks(tokens: Sequence[int], times: Sequence[float], chunk: int) -> list[Sequence[int]]:
    """The tokens up to each multiple of a length, as Qwen2.5-Omni's processor cuts them.

    A token begins at most one chunk, also where the times of two are further apart.
    """
    chunks, start = list[Sequence[int]](), 0
    for number, time in enumerate(times):
        if time >= (len(chunks) + 1) * chunk:
            chunks.append(tokens[start:number])
            start = number
    return [*chunks, tokens[start:]]
