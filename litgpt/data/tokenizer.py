"""Text to token numbers and back, by the tokenizer files in a model's folder; and training such files from text."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from litgpt.errors import UserError
from litgpt.files import read_json, staged_folder, write_json

if TYPE_CHECKING:
    from torch import Tensor

BOS, EOS = "<|bos|>", "<|eos|>"
"""The special tokens of the tokenizers that we train."""


class Tokenizer:
    """The tokenizer in a folder: tokenizer.json, or else sentencepiece's tokenizer.model.

    Whether a text gets a beginning-of-sequence token is read from the files, in this order: `add_bos_token` in
    tokenizer_config.json; a post-processor in tokenizer.json that adds it; the tokenizer class `LlamaTokenizer`.

    Args:
        folder: where the files are.

    Attributes:
        bos_id, eos_id: number of the token that begins and ends a text, or None.
        use_bos: whether `encode` adds `bos_id` unless told.
        vocab_size: tokens without those added after training (LitGPT's count).
        id_limit: one more than the largest token number: what an embedding table must hold.

    Raises:
        UserError: if a file is missing or damaged.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._config = _settings(self.folder / "tokenizer_config.json")
        self.backend: Literal["huggingface", "sentencepiece"]
        if (self.folder / "tokenizer.json").is_file():
            self.backend, self.processor = "huggingface", _read_huggingface(self.folder / "tokenizer.json")
            self.vocab_size: int = self.processor.get_vocab_size(with_added_tokens=False)
            self.id_limit: int = max(self.processor.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        elif (self.folder / "tokenizer.model").is_file():
            self.backend, self.processor = "sentencepiece", _read_sentencepiece(self.folder / "tokenizer.model")
            self.vocab_size = self.id_limit = self.processor.vocab_size()
        else:
            raise UserError(
                f"tokenizer_dir: {self.folder} holds neither tokenizer.json nor tokenizer.model; give a model's "
                "folder, or make one with `litgpt tokenizer train`"
            )
        self.bos_id = self._special("bos")
        self.eos_id = self._special("eos")
        self.use_bos = self.bos_id is not None and self._adds_bos()

    def _special(self, name: str) -> int | None:
        if self.backend == "sentencepiece":
            number = self.processor.bos_id() if name == "bos" else self.processor.eos_id()
            return number if number >= 0 else None
        token = self._config.get(f"{name}_token")
        if isinstance(token, dict):
            token = token.get("content")
        if token is not None:
            return self.token_to_id(token)
        number = _settings(self.folder / "generation_config.json").get(f"{name}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if number is not None and not (isinstance(number, int) and 0 <= number < self.id_limit):
            raise UserError(f"{self.folder / 'generation_config.json'}: {name}_token_id: {number} is no token")
        return number

    def _adds_bos(self) -> bool:
        if isinstance(self._config.get("add_bos_token"), bool):
            return self._config["add_bos_token"]
        if self.backend == "huggingface" and self.processor.encode("a").ids[:1] == [self.bos_id]:
            return True
        return self._config.get("tokenizer_class") == "LlamaTokenizer"

    def token_to_id(self, token: str) -> int:
        """The number of a token.

        Raises:
            UserError: if there is no such token.
        """
        number = (self.processor.token_to_id if self.backend == "huggingface" else self.processor.piece_to_id)(token)
        unknown = self.backend == "sentencepiece" and number == self.processor.unk_id()
        if number is None or (unknown and token != self.processor.id_to_piece(number)):
            raise UserError(f"{self.folder}: the tokenizer has no token {token!r}")
        return number

    def encode(self, string: str, bos: bool | None = None, eos: bool = False, max_length: int = -1) -> "Tensor":
        """The tokens of a text, int32 of shape (T,).

        Args:
            bos: begin with `bos_id`; None follows `use_bos`. A text that spells it already gets no second one.
            eos: end with `eos_id`.
            max_length: keep at most this many tokens; -1 keeps all.

        Raises:
            UserError: if `bos` or `eos` asks for a token that the tokenizer lacks.
        """
        import torch

        tokens = self.frame(self.encode_batch([string])[0], bos=bos, eos=eos)
        return torch.from_numpy(tokens[:max_length] if max_length > 0 else tokens)

    def frame(self, tokens: np.ndarray, *, bos: bool | None = None, eos: bool = False) -> np.ndarray:
        """Tokens with `bos_id` before and `eos_id` behind them, as `encode` says."""
        for wanted, name, number in ((bos, "bos", self.bos_id), (eos, "eos", self.eos_id)):
            if wanted and number is None:
                raise UserError(f"{self.folder}: the tokenizer has no {name} token; tokenizer_config.json names none")
        front = self.bos_id if bos or (bos is None and self.use_bos) else None
        back = self.eos_id if eos else None
        before = [] if front is None or (len(tokens) and tokens[0] == front) else [front]
        behind = [] if back is None or (len(tokens) and tokens[-1] == back) else [back]
        return np.concatenate([np.array(before, np.int32), tokens, np.array(behind, np.int32)])

    def encode_batch(self, strings: list[str]) -> list[np.ndarray]:
        """The tokens of each text, int32 of shape (T,), with nothing added; in parallel over the texts."""
        if self.backend == "sentencepiece":
            return [np.array(ids, dtype=np.int32) for ids in self.processor.encode(strings)]
        encodings = self.processor.encode_batch_fast(strings, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, tokens: "Tensor | np.ndarray | list[int]") -> str:
        """The text of some tokens, without special ones."""
        numbers = tokens if isinstance(tokens, list) else tokens.reshape(-1).tolist()
        return self.processor.decode(numbers)

    def decode_stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """The text piece by piece, each as soon as its tokens make whole characters."""
        recent: list[int] = []
        shown = ""
        for token in tokens:
            recent.append(int(token))
            text = self.decode(recent)
            if not text.endswith("\ufffd"):  # part of a character, of which more bytes follow
                yield text[len(shown) :]
                # the few tokens kept tell whether the next one begins with a space
                recent = recent[-8:]
                shown = self.decode(recent)
        if recent and (rest := self.decode(recent)[len(shown) :]):
            yield rest

    def fingerprint(self) -> str:
        """A hash of all that decides how text becomes tokens, in hexadecimal."""
        name = "tokenizer.json" if self.backend == "huggingface" else "tokenizer.model"
        digest = hashlib.sha256((self.folder / name).read_bytes())
        digest.update(repr((self.bos_id, self.eos_id, self.use_bos)).encode())
        return digest.hexdigest()


def _settings(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no file."""
    if not path.is_file():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds {type(value).__name__}, not a JSON object")
    return value


def _read_huggingface(path: Path) -> Any:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:  # the library raises a bare Exception, or panics past it, on a damaged file
        raise UserError(f"{path}: not a tokenizer ({str(error)[:200]})") from None


def _read_sentencepiece(path: Path) -> Any:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise UserError(f"{path}: needs the package sentencepiece; `pip install sentencepiece`") from None
    try:
        return SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path}: not a sentencepiece model ({str(error)[:200]})") from None


def train_tokenizer(
    documents: Iterable[str], kind: Literal["bpe", "bytes"], vocab_size: int, folder: Path
) -> "Tokenizer":
    """Write the files of a new tokenizer and open it; the same documents give the same files.

    Args:
        documents: the text to learn from; `bytes` does not look at it.
        kind: `bpe` for byte-pair encoding over bytes (GPT-2's pre-tokenizer), `bytes` for one token per byte.
        vocab_size: tokens in all, for `bpe`: 256 bytes, two special tokens, and at most the rest in merges (fewer
            where the text has no more pairs that occur twice).
        folder: where tokenizer.json and tokenizer_config.json go; it must not exist.

    Raises:
        UserError: if `vocab_size` is too small or the folder exists.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    if kind not in ("bpe", "bytes"):
        raise UserError(f"tokenizer.kind: {kind!r} is not known; bpe or bytes would do")
    if kind == "bpe" and not 258 <= vocab_size <= 4_000_000:
        raise UserError(f"tokenizer.vocab_size: {vocab_size} does not hold 256 bytes and 2 special tokens; 8192 would")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([BOS, EOS, *alphabet])}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "bpe")
    backend.decoder = decoders.ByteLevel()
    if kind == "bpe":
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[BOS, EOS],
            initial_alphabet=alphabet,
            show_progress=False,
        )
        backend.train_from_iterator(documents, trainer)
    else:
        backend.add_special_tokens([BOS, EOS])
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    with staged_folder(folder) as staged:
        # pretty, so that two tokenizers can be compared line by line
        (staged / "tokenizer.json").write_text(backend.to_str(pretty=True), encoding="utf-8")
        write_json(
            staged / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": BOS,
                "eos_token": EOS,
                "add_bos_token": True,
                "clean_up_tokenization_spaces": False,
            },
        )
    return Tokenizer(folder)
