"""Encode and decode text with the tokenizer files of a model folder, and train new tokenizers."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from litgpt.data.sentencepiece import SentencePieceTokenizer, read_sentencepiece
from litgpt.errors import UserError
from litgpt.files import find_surrogate, read_json, staged_folder, write_json
from litgpt.phases import phase

if TYPE_CHECKING:
    import torch
    from torch import Tensor

GENERATION_FILES = ("generation_config.json", "config.json")
BOS, EOS = "<|bos|>", "<|eos|>"
"""Special tokens of the tokenizers that `train_tokenizer` writes."""


class Tokenizer:
    """The tokenizer in a folder: tokenizer.json, or else sentencepiece's tokenizer.model.

    Whether a bos token is added to texts is read from the files, in this order: `add_bos_token` in
    tokenizer_config.json; a post-processor in tokenizer.json that adds it; the tokenizer class `LlamaTokenizer`, which
    adds it by default. `add_eos_token` and the post-processor do the same for the eos token.

    Args:
        folder: the folder of the files.

    Attributes:
        bos_id, eos_id: ids of the bos and eos tokens, or None.
        stop_ids: all tokens that end generation: `eos_id`, and those of generation_config.json.
        use_bos, use_eos: whether `bos_id` and `eos_id` are added to texts by default.
        vocab_size: number of tokens without those added after training (as in LitGPT).
        id_limit: the largest token id plus one: the size that an embedding table needs.
        warnings: special tokens in the files that the tokenizer does not have, which are left out, and what
            `check_rows` found; one line each.

    Raises:
        UserError: if a file is missing or damaged.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.warnings: list[str] = []
        self.model_name = self.folder.resolve().name
        self._config = _read_settings(self.folder / "tokenizer_config.json")
        self.backend: Literal["huggingface", "sentencepiece"]
        if (self.folder / "tokenizer.json").is_file():
            self.backend, self.processor = "huggingface", _read_huggingface(self.folder / "tokenizer.json")
            self.vocab_size: int = self.processor.get_vocab_size(with_added_tokens=False)
            self.id_limit: int = max(self.processor.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        elif (self.folder / "tokenizer.model").is_file():
            self.backend, self.processor = "sentencepiece", read_sentencepiece(self.folder / "tokenizer.model")
            added, hidden = self._added_tokens()
            self._sentencepiece = SentencePieceTokenizer(
                self.processor, added, hidden, legacy=self._config.get("legacy") is True
            )
            self.vocab_size = self.processor.vocab_size()
            self.id_limit = max([self.vocab_size - 1, *added.values()]) + 1
        else:
            raise UserError(
                f"{self.folder}: has neither tokenizer.json nor tokenizer.model; use the folder of a "
                "model, get one with `litgpt download`, or train a tokenizer with `litgpt tokenizer train`"
            )
        self.bos_id = self._find_special_id("bos")
        self.eos_id = self._find_special_id("eos")
        ends = [self.eos_id, *self._read_generation_ids("eos")]
        self.stop_ids = tuple(dict.fromkeys(number for number in ends if number is not None))
        self.use_bos = self.bos_id is not None and self._adds_by_default("bos")
        self.use_eos = self.eos_id is not None and self._adds_by_default("eos")

    def _added_tokens(self) -> tuple[dict[str, int], set[int]]:
        """Read the tokens added to a sentencepiece model, by text, and the ids of the special ones."""
        added: dict[str, int] = dict(_read_settings(self.folder / "added_tokens.json"))
        entries = self._config.get("added_tokens_decoder", {})
        try:
            added |= {entry["content"]: int(number) for number, entry in entries.items()}
            hidden = {int(number) for number, entry in entries.items() if entry.get("special")}
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError(
                f"{self.folder / 'tokenizer_config.json'}: added_tokens_decoder does not map ids to tokens"
            ) from None
        if not all(isinstance(text, str) and text and isinstance(number, int) for text, number in added.items()):
            raise UserError(f"{self.folder / 'added_tokens.json'}: does not map tokens to ids")
        return added, hidden

    def special_tokens(self) -> dict[str, str]:
        """Texts of the special tokens in tokenizer_config.json, by names such as `bos_token`, for chat templates."""
        tokens = {key: value for key, value in self._config.items() if key.endswith("_token")}
        texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in tokens.items()}
        return {key: value for key, value in texts.items() if isinstance(value, str)}

    def _find_special_id(self, name: str) -> int | None:
        if (token := self.special_tokens().get(f"{name}_token")) is not None:
            if (number := self.find_token(token)) is not None:
                return number
            path = self.folder / "tokenizer_config.json"
            self._warn(f"{path}: {name}_token: {token!r} is not a token of the tokenizer; left out")
        if self.backend == "sentencepiece":
            number = self.processor.bos_id() if name == "bos" else self.processor.eos_id()
            return number if number >= 0 else None
        return next(iter(self._read_generation_ids(name)), None)

    def _warn(self, line: str) -> None:
        if line not in self.warnings:
            self.warnings.append(line)

    def _read_generation_ids(self, name: str) -> list[int]:
        """Read the bos or eos ids in generation_config.json, or else in config.json: one or several."""
        paths = [path for path in map(self.folder.joinpath, GENERATION_FILES) if path.is_file()]
        if not paths:
            return []
        value = _read_settings(paths[0]).get(f"{name}_token_id")
        numbers = value if isinstance(value, list) else [] if value is None else [value]
        for number in numbers:
            if type(number) is not int:
                raise UserError(f"{paths[0]}: {name}_token_id: {number!r} is not a token id")
            # config.json may have the default of its class
            if not 0 <= number < self.id_limit and paths[0].name != "config.json":
                limit = self.id_limit - 1
                self._warn(f"{paths[0]}: {name}_token_id: {number} is not a token (0 to {limit}); left out")
        return [number for number in numbers if 0 <= number < self.id_limit]

    def _adds_by_default(self, name: Literal["bos", "eos"]) -> bool:
        setting = self._config.get(f"add_{name}_token")
        if isinstance(setting, bool):
            return setting
        if self.backend == "huggingface":
            ids = self.processor.encode("a").ids
            if len(ids) > 1 and (ids[0] == self.bos_id if name == "bos" else ids[-1] == self.eos_id):
                return True
        return name == "bos" and self._config.get("tokenizer_class") == "LlamaTokenizer"

    def check_rows(self, rows: int, cure: str = "use the model's own tokenizer") -> None:
        """Add a warning if the tokenizer is larger, or much smaller, than an embedding of this many rows.

        Published models have up to about 1,000 rows without a token, at most 2 % of all, which pad the size to a round
        number; many are more than 512 rows, and a tenth of all.
        """
        if self.id_limit > rows or rows - self.id_limit > max(512, rows // 10):
            sizes = f"the tokenizer has {self.id_limit:,} tokens, but the model has {rows:,} rows"
            refusal = "a text with a token beyond them is refused; " if self.id_limit > rows else ""
            self._warn(f"{self.folder}: {sizes}; {refusal}{cure}")

    def find_token(self, token: str) -> int | None:
        """Return the id of a token; None if there is no such token."""
        find = self.processor.token_to_id if self.backend == "huggingface" else self._sentencepiece.token_to_id
        number: int | None = find(token)
        return number

    def token_to_id(self, token: str) -> int:
        """Return the id of a token.

        Raises:
            UserError: if there is no such token.
        """
        number = self.find_token(token)
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
        """Encode a text as (T,) int32 token ids.

        Args:
            device: the device of the tensor; None for the CPU.
            bos: start with `bos_id`, unless the text already does; None for `use_bos`.
            eos: end with `eos_id`, unless the text already does; None for `use_eos`.
            max_length: maximum number of tokens; -1 for no limit.

        Raises:
            UserError: if `bos` or `eos` is True but the tokenizer has no such token.
        """
        import torch

        tokens = self.frame(self.encode_batch([string])[0], bos=bos, eos=eos)
        return torch.from_numpy(tokens[:max_length] if max_length > 0 else tokens).to(device or "cpu")

    def frame(self, tokens: np.ndarray, *, bos: bool | None = None, eos: bool | None = False) -> np.ndarray:
        """Add `bos_id` and `eos_id` to tokens, as in `encode`."""
        for wanted, name, number in ((bos, "bos", self.bos_id), (eos, "eos", self.eos_id)):
            if wanted and number is None:
                raise UserError(f"{self.folder}: the tokenizer has no {name} token; set it in tokenizer_config.json")
        front = self.bos_id if bos or (bos is None and self.use_bos) else None
        back = self.eos_id if eos or (eos is None and self.use_eos) else None
        before = [] if front is None or (len(tokens) and tokens[0] == front) else [front]
        after = [] if back is None or (len(tokens) and tokens[-1] == back) else [back]
        return np.concatenate([np.array(before, np.int32), tokens, np.array(after, np.int32)])

    def encode_batch(self, strings: list[str]) -> list[np.ndarray]:
        """Encode texts in parallel as (T,) int32 token ids, without bos and eos.

        Raises:
            UserError: for a text that is not UTF-8, which has a lone surrogate.
        """
        for string in strings:
            if (position := find_surrogate(string)) is not None:
                part = string[max(position - 20, 0) : position + 20]
                raise UserError(f"text: {part!r} is not UTF-8 at character {position + 1}; give it in UTF-8")
        if self.backend == "sentencepiece":
            return [np.array(ids, dtype=np.int32) for ids in self._sentencepiece.encode_batch(strings)]
        encodings = self.processor.encode_batch_fast(strings, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, tokens: "Tensor | np.ndarray | list[int]") -> str:
        """Decode token ids, without special tokens."""
        numbers = tokens if isinstance(tokens, list) else tokens.reshape(-1).tolist()
        return (
            self._sentencepiece.decode(numbers) if self.backend == "sentencepiece" else self.processor.decode(numbers)
        )

    def decode_stream(self, tokens: Iterable[int], *, context: Sequence[int] = ()) -> Iterator[str]:
        """Decode a stream of tokens; yields text as soon as its characters are complete.

        Args:
            context: the preceding tokens, which determine whether the first one starts with a space.
        """
        decoder = StreamDecoder(self, context)
        for token in tokens:
            if piece := decoder.push(int(token)):
                yield piece
        if rest := decoder.finish():
            yield rest

    def fingerprint(self) -> str:
        """Hash everything that the tokens of a text depend on, in hexadecimal."""
        name = "tokenizer.json" if self.backend == "huggingface" else "tokenizer.model"
        digest = hashlib.sha256((self.folder / name).read_bytes())
        digest.update(repr((self.bos_id, self.eos_id, self.use_bos)).encode())
        if self.backend == "sentencepiece":
            digest.update(repr((sorted(self._sentencepiece.special.items()), self._sentencepiece.legacy)).encode())
        return digest.hexdigest()


class StreamDecoder:
    """Decodes tokens as they arrive.

    Args:
        context: the preceding tokens, which determine whether the first one starts with a space.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._decode = tokenizer.decode
        self._recent, self._shown = list(context), tokenizer.decode(list(context))
        self._before = len(self._recent)

    def push(self, token: int) -> str:
        """The text that one more token completes; empty if bytes of its last character are missing."""
        self._recent.append(token)
        text = self._decode(self._recent)
        if len(text) <= len(self._shown) or text.endswith("\ufffd"):
            return ""
        piece = text[len(self._shown) :]
        # the tokens of the last piece determine whether the next one starts with a space
        self._recent, self._before = self._recent[self._before :], len(self._recent) - self._before
        self._shown = self._decode(self._recent)
        return piece

    def finish(self) -> str:
        """The text that is left after the last token."""
        return self._decode(self._recent)[len(self._shown) :]


def _read_settings(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file; empty if there is no file."""
    if not path.is_file():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: contains {type(value).__name__}, not a JSON object")
    return value


def _read_huggingface(path: Path) -> Any:
    import tokenizers

    try:
        processor = tokenizers.Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:  # the library raises a bare Exception or panics on a damaged file
        raise UserError(f"{path}: not a tokenizer ({str(error)[:200]})") from None
    processor.no_truncation()  # some files contain the settings of a training run
    processor.no_padding()
    return processor


def train_tokenizer(
    documents: Iterable[str], kind: Literal["bpe", "bytes"], vocab_size: int, folder: Path
) -> "Tokenizer":
    """Train a tokenizer, write its files and open it; equal documents give equal files.

    Args:
        documents: the training text; not used by `bytes`.
        kind: `bpe` for byte-pair encoding over bytes (GPT-2's pre-tokenizer), `bytes` for one token per byte.
        vocab_size: vocabulary size for `bpe`: 256 bytes, two special tokens, and the rest merges (fewer if the text
            has no more pairs that occur twice).
        folder: the folder for tokenizer.json and tokenizer_config.json; it must not exist.

    Raises:
        UserError: if `vocab_size` is too small or the folder exists.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    if kind not in ("bpe", "bytes"):
        raise UserError(f"kind: {kind!r} is unknown; use bpe or bytes")
    if kind == "bpe" and not 258 <= vocab_size <= 4_000_000:
        raise UserError(f"vocab_size: {vocab_size} is out of range; use 258 to 4000000, such as 8192")
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
        with phase("training the tokenizer"):
            backend.train_from_iterator(documents, trainer)
    else:
        backend.add_special_tokens([BOS, EOS])
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    with staged_folder(folder) as staged:
        # indented, so that two tokenizers can be compared line by line
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
