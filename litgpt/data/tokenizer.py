"""Text to token numbers and back, by the tokenizer files in a model's folder; and training such files from text."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from litgpt.data.sentencepiece import SentencePieceTokenizer, read_sentencepiece
from litgpt.errors import UserError
from litgpt.files import read_json, staged_folder, write_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

GENERATION_FILES = ("generation_config.json", "config.json")
BOS, EOS = "<|bos|>", "<|eos|>"
"""The special tokens of the tokenizers that we train."""


class Tokenizer:
    """The tokenizer in a folder: tokenizer.json, or else sentencepiece's tokenizer.model.

    Whether a text gets a beginning-of-sequence token is read from the files, in this order: `add_bos_token` in
    tokenizer_config.json; a post-processor in tokenizer.json that adds it; the tokenizer class `LlamaTokenizer`, whose
    default it is. `add_eos_token` and the post-processor say the same of an end-of-sequence token.

    Args:
        folder: where the files are.

    Attributes:
        bos_id, eos_id: number of the token that begins and ends a text, or None.
        stop_ids: every token that ends what a model writes: `eos_id`, and those of generation_config.json.
        use_bos, use_eos: whether the folder adds `bos_id` and `eos_id` to a text.
        vocab_size: tokens without those added after training (LitGPT's count).
        id_limit: one more than the largest token number: what an embedding table must hold.

    Raises:
        UserError: if a file is missing or damaged.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.model_name = self.folder.resolve().name
        self._config = _settings(self.folder / "tokenizer_config.json")
        self.backend: Literal["huggingface", "sentencepiece"]
        if (self.folder / "tokenizer.json").is_file():
            self.backend, self.processor = "huggingface", _read_huggingface(self.folder / "tokenizer.json")
            self.vocab_size: int = self.processor.get_vocab_size(with_added_tokens=False)
            self.id_limit: int = max(self.processor.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        elif (self.folder / "tokenizer.model").is_file():
            self.backend, self.processor = "sentencepiece", read_sentencepiece(self.folder / "tokenizer.model")
            added, hidden = self._added_tokens()
            self._pieces = SentencePieceTokenizer(
                self.processor, added, hidden, legacy=self._config.get("legacy") is True
            )
            self.vocab_size = self.processor.vocab_size()
            self.id_limit = max([self.vocab_size - 1, *added.values()]) + 1
        else:
            raise UserError(
                f"tokenizer_dir: {self.folder} holds neither tokenizer.json nor tokenizer.model; give a model's "
                "folder, or make one with `litgpt tokenizer train`"
            )
        self.bos_id = self._special("bos")
        self.eos_id = self._special("eos")
        ends = [self.eos_id, *self._generation_ids("eos")]
        self.stop_ids = tuple(dict.fromkeys(number for number in ends if number is not None))
        self.use_bos = self.bos_id is not None and self._adds("bos")
        self.use_eos = self.eos_id is not None and self._adds("eos")

    def _added_tokens(self) -> tuple[dict[str, int], set[int]]:
        """The tokens added to a sentencepiece model by text, and which of them are special."""
        added: dict[str, int] = dict(_settings(self.folder / "added_tokens.json"))
        entries = self._config.get("added_tokens_decoder", {})
        try:
            added |= {entry["content"]: int(number) for number, entry in entries.items()}
            hidden = {int(number) for number, entry in entries.items() if entry.get("special")}
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError(
                f"{self.folder / 'tokenizer_config.json'}: added_tokens_decoder is no mapping of numbers to tokens"
            ) from None
        if not all(isinstance(text, str) and text and isinstance(number, int) for text, number in added.items()):
            raise UserError(f"{self.folder / 'added_tokens.json'}: is no mapping of tokens to numbers")
        return added, hidden

    def special_tokens(self) -> dict[str, str]:
        """The texts of the tokens that tokenizer_config.json names, such as `bos_token`: what chat templates read."""
        named = {key: value for key, value in self._config.items() if key.endswith("_token")}
        texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
        return {key: value for key, value in texts.items() if isinstance(value, str)}

    def _special(self, name: str) -> int | None:
        token = self._config.get(f"{name}_token")
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            return self.token_to_id(token)
        if self.backend == "sentencepiece":
            number = self.processor.bos_id() if name == "bos" else self.processor.eos_id()
            return number if number >= 0 else None
        return next(iter(self._generation_ids(name)), None)

    def _generation_ids(self, name: str) -> list[int]:
        """The tokens that generation_config.json, or in its place config.json, names as bos or eos: one or several."""
        found = [path for path in map(self.folder.joinpath, GENERATION_FILES) if path.is_file()]
        if not found:
            return []
        value = _settings(found[0]).get(f"{name}_token_id")
        numbers = value if isinstance(value, list) else [] if value is None else [value]
        for number in numbers:
            if type(number) is not int or number < 0 or (found[0].name != "config.json" and number >= self.id_limit):
                raise UserError(f"{found[0]}: {name}_token_id: {number!r} is no token")
        return [number for number in numbers if number < self.id_limit]  # config.json may hold a default of its class

    def _adds(self, name: Literal["bos", "eos"]) -> bool:
        said = self._config.get(f"add_{name}_token")
        if isinstance(said, bool):
            return said
        if self.backend == "huggingface":
            ids = self.processor.encode("a").ids
            if len(ids) > 1 and (ids[0] == self.bos_id if name == "bos" else ids[-1] == self.eos_id):
                return True
        return name == "bos" and self._config.get("tokenizer_class") == "LlamaTokenizer"

    def token_to_id(self, token: str) -> int:
        """The number of a token.

        Raises:
            UserError: if there is no such token.
        """
        find = self.processor.token_to_id if self.backend == "huggingface" else self._pieces.token_to_id
        number: int | None = find(token)
        if number is None:
            raise UserError(f"{self.folder}: the tokenizer has no token {token!r}")
        return number

    def encode(
        self,
        string: str,
        device: "torch.device | str | None" = None,
        bos: bool | None = None,
        eos: bool | None = False,
        max_length: int = -1,
    ) -> "Tensor":
        """The tokens of a text, int32 of shape (T,).

        Args:
            device: where the tensor goes; None for the CPU.
            bos: begin with `bos_id`; None follows `use_bos`. A text that spells it already gets no second one.
            eos: end with `eos_id`; None follows `use_eos`.
            max_length: keep at most this many tokens; -1 keeps all.

        Raises:
            UserError: if `bos` or `eos` asks for a token that the tokenizer lacks.
        """
        import torch

        tokens = self.frame(self.encode_batch([string])[0], bos=bos, eos=eos)
        return torch.from_numpy(tokens[:max_length] if max_length > 0 else tokens).to(device or "cpu")

    def frame(self, tokens: np.ndarray, *, bos: bool | None = None, eos: bool | None = False) -> np.ndarray:
        """Tokens with `bos_id` before and `eos_id` behind them, as `encode` says."""
        for wanted, name, number in ((bos, "bos", self.bos_id), (eos, "eos", self.eos_id)):
            if wanted and number is None:
                raise UserError(f"{self.folder}: the tokenizer has no {name} token; tokenizer_config.json names none")
        front = self.bos_id if bos or (bos is None and self.use_bos) else None
        back = self.eos_id if eos or (eos is None and self.use_eos) else None
        before = [] if front is None or (len(tokens) and tokens[0] == front) else [front]
        behind = [] if back is None or (len(tokens) and tokens[-1] == back) else [back]
        return np.concatenate([np.array(before, np.int32), tokens, np.array(behind, np.int32)])

    def encode_batch(self, strings: list[str]) -> list[np.ndarray]:
        """The tokens of each text, int32 of shape (T,), with nothing added; in parallel over the texts."""
        if self.backend == "sentencepiece":
            return [np.array(ids, dtype=np.int32) for ids in self._pieces.encode_batch(strings)]
        encodings = self.processor.encode_batch_fast(strings, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, tokens: "Tensor | np.ndarray | list[int]") -> str:
        """The text of some tokens, without special ones."""
        numbers = tokens if isinstance(tokens, list) else tokens.reshape(-1).tolist()
        return self._pieces.decode(numbers) if self.backend == "sentencepiece" else self.processor.decode(numbers)

    def decode_stream(self, tokens: Iterable[int], *, behind: Sequence[int] = ()) -> Iterator[str]:
        """The text piece by piece, each as soon as its tokens make whole characters.

        Args:
            behind: tokens of a text that these go on with, which tell whether the first one begins with a space.
        """
        recent, shown = list(behind), self.decode(list(behind))
        before = len(recent)
        for token in tokens:
            recent.append(int(token))
            text = self.decode(recent)
            if len(text) > len(shown) and not text.endswith("\ufffd"):  # else more bytes of a character follow
                yield text[len(shown) :]
                # the tokens of one piece tell whether the next begins with a space; cut there, they are whole
                recent, before = recent[before:], len(recent) - before
                shown = self.decode(recent)
        if rest := self.decode(recent)[len(shown) :]:
            yield rest

    def fingerprint(self) -> str:
        """A hash of all that decides how text becomes tokens, in hexadecimal."""
        name = "tokenizer.json" if self.backend == "huggingface" else "tokenizer.model"
        digest = hashlib.sha256((self.folder / name).read_bytes())
        digest.update(repr((self.bos_id, self.eos_id, self.use_bos)).encode())
        if self.backend == "sentencepiece":
            digest.update(repr((sorted(self._pieces.special.items()), self._pieces.legacy)).encode())
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
        processor = tokenizers.Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:  # the library raises a bare Exception, or panics past it, on a damaged file
        raise UserError(f"{path}: not a tokenizer ({str(error)[:200]})") from None
    processor.no_truncation()  # some files hold those of a training run
    processor.no_padding()
    return processor


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
