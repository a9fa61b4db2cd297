"""Token shards: what is in them, when they are reused or made again, and what an interruption leaves."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from litgpt.data.cache.token_shards import Corpus, TokenFile, prepare_tokens, split_text
from litgpt.data.read.documents import SkippedRows, fingerprint_files, read_documents
from litgpt.data.tokenizer import Tokenizer, train_tokenizer
from litgpt.errors import UserError
from litgpt.files import DamagedFileError, verify_manifest

TEXTS = ["the fox", "a dog\nand a fox", "wörter", "the end of it"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(TEXTS * 5, "bpe", 300, tmp_path_factory.mktemp("tok") / "bpe")


def corpus_of(folder: Path, **changes: object) -> Corpus:
    files = sorted(folder.glob("*.txt"))
    settings: dict = {
        "name": "text",
        "sources": fingerprint_files(files, folder / "hashes.json"),
        "documents": lambda wrap_file, _skipped: (
            text for file in files for text in read_documents(file, wrap_file=wrap_file)
        ),
        "bos": True,
    }
    return Corpus(**settings | changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text(text)
    return tmp_path


def test_tokens_are_those_of_each_document(folder: Path, tokenizer: Tokenizer) -> None:
    tokens = prepare_tokens(corpus_of(folder), tokenizer, folder / "cache")
    expected = [tokenizer.encode(text, bos=True).tolist() for text in TEXTS]
    assert tokens.read(0, tokens.total).tolist() == [number for tokens_of_one in expected for number in tokens_of_one]
    starts = np.cumsum([0, *map(len, expected)])
    assert tokens.find_document_starts(0, tokens.total).tolist() == starts[:-1].tolist()
    assert tokens.find_document_starts(starts[1], starts[2]).tolist() == [starts[1]]
    assert tokens.find_document_starts(starts[1] + 1, starts[2]).tolist() == []
    assert (tokens.documents, tokens.metadata["skipped"], tokens.metadata["dtype"]) == (4, 0, "uint16")
    verify_manifest(tokens.folder)


def test_second_time_reads_nothing(folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare_tokens(corpus_of(folder), tokenizer, folder / "cache")
    monkeypatch.setattr(Tokenizer, "encode_batch", None)
    assert prepare_tokens(corpus_of(folder), tokenizer, folder / "cache").folder == first.folder


def test_what_changes_the_tokens_makes_them_again(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    cache, other = folder / "cache", train_tokenizer([], "bytes", 258, tmp_path / "bytes")
    built = [prepare_tokens(corpus_of(folder), tokenizer, cache)]
    built.append(prepare_tokens(corpus_of(folder), other, cache))
    built.append(prepare_tokens(corpus_of(folder, bos=False), tokenizer, cache))
    built.append(prepare_tokens(corpus_of(folder, eos=True), tokenizer, cache))
    (folder / "0.txt").write_text("the fax")  # same name, size and day
    built.append(prepare_tokens(corpus_of(folder), tokenizer, cache))
    (folder / "0.txt").rename(folder / "9.txt")  # same texts in another order
    built.append(prepare_tokens(corpus_of(folder), tokenizer, cache))
    assert (
        len({tokens.fingerprint for tokens in built}) == len(built) == len([p for p in cache.iterdir() if p.is_dir()])
    )
    assert built[3].total == built[2].total + 2 * 4


class Stop(Exception):
    pass


@pytest.mark.parametrize("after", range(5))
def test_interruption_leaves_nothing(folder: Path, tokenizer: Tokenizer, after: int) -> None:
    def breaking(_wrap_file: object, _skipped: SkippedRows) -> Iterator[str]:
        yield from TEXTS[:after]
        raise Stop

    with pytest.raises(Stop):
        prepare_tokens(corpus_of(folder, documents=breaking), tokenizer, folder / "cache")
    assert [path.name for path in (folder / "cache").iterdir()] == ["lock"]


KILLED = """
import sys, time
from pathlib import Path
from tests.data.cache.test_token_shards import TEXTS, corpus_of
from litgpt.data.cache import token_shards as shards
from litgpt.data.tokenizer import Tokenizer

def slow(wrap_file, skipped):
    shards.BATCH_CHARACTERS = 1
    yield from TEXTS
    print("half", flush=True)
    time.sleep(60)

folder, tokenizer = Path(sys.argv[1]), Tokenizer(sys.argv[2])
shards.prepare_tokens(corpus_of(folder, documents=slow), tokenizer, folder / "cache")
"""


def test_killed_process_is_cleaned_up_after(
    folder: Path, tokenizer: Tokenizer, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [sys.executable, "-c", KILLED, str(folder), str(tokenizer.folder)]
    root = Path(__file__).parents[3]
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}
    ) as process:
        assert process.stdout and process.stdout.readline() == b"half\n"
        waiting = list((folder / "cache").glob("*.partial"))
        process.kill()
    assert len(waiting) == 1 and waiting[0].exists()
    tokens = prepare_tokens(corpus_of(folder), tokenizer, folder / "cache")
    assert sorted(path.name for path in (folder / "cache").iterdir()) == sorted(["lock", tokens.folder.name])
    assert f"removing {waiting[0]}" in capfd.readouterr().err


def test_two_at_once_make_it_once(folder: Path, tokenizer: Tokenizer) -> None:
    from concurrent.futures import ThreadPoolExecutor

    opened = []

    def slowly(_wrap_file: object, _skipped: SkippedRows) -> Iterator[str]:
        opened.append(1)
        time.sleep(0.3)
        yield from TEXTS

    corpus = corpus_of(folder, documents=slowly)
    with ThreadPoolExecutor(3) as pool:
        built = list(pool.map(lambda _: prepare_tokens(corpus, tokenizer, folder / "cache"), range(3)))
    assert len(opened) == 1 and len({tokens.total for tokens in built}) == 1


@pytest.mark.parametrize("name", ["tokens.bin", "documents.bin", "tokens.json"])
def test_damage_is_refused_by_name(folder: Path, tokenizer: Tokenizer, name: str) -> None:
    tokens = prepare_tokens(corpus_of(folder), tokenizer, folder / "cache")
    path = tokens.folder / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(DamagedFileError, match=str(path)):
        TokenFile(tokens.folder)
    path.write_bytes(whole[:3] + bytes([whole[3] ^ 1]) + whole[4:])
    with pytest.raises(DamagedFileError, match=str(path)):
        verify_manifest(tokens.folder)


def test_no_text_and_no_room(folder: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="has no tokens"):
        prepare_tokens(corpus_of(folder, documents=lambda _wrap_file, _skipped: []), tokenizer, folder / "cache")
    (folder / "file").write_text("")
    with pytest.raises(UserError, match=r"file.*data\.cache_dir"):
        prepare_tokens(corpus_of(folder), tokenizer, folder / "file")


def random_text(seed: int, words: int) -> str:
    generator = random.Random(seed)
    alphabet = [
        "fox",
        "dog",
        "the",
        "  ",
        "\n",
        "\n\n",
        "\r",
        "\t",
        "don't",
        "12345",
        "日本語",
        "e\u0301",
        "<|eos|>",
        "…",
        "\u2028",
    ]
    return "".join(generator.choice(alphabet) + generator.choice([" ", "", "\n"]) for _ in range(words))


def variants(tokenizer: Tokenizer, root: Path) -> Iterator[Tokenizer]:
    """The tokenizer with the pre-tokenizers and normalizers in use."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    llama3 = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(llama3), "isolated")
    settings = [
        (tokenizer.processor.pre_tokenizer, None),
        (pre_tokenizers.Sequence([split, byte_level]), None),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), None),
        (pre_tokenizers.Metaspace(), None),
        (byte_level, normalizers.NFC()),
        (byte_level, normalizers.Prepend("_")),
        (None, normalizers.Sequence([normalizers.Prepend("_"), normalizers.Replace(" ", "_")])),
    ]
    for number, (pre_tokenizer, normalizer) in enumerate(settings):
        built = train_tokenizer(TEXTS * 5, "bpe", 300, root / str(number))
        built.processor.pre_tokenizer = pre_tokenizer
        if normalizer:
            built.processor.normalizer = normalizer
        yield built


def test_cutting_never_changes_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    cuts = []
    for number, built in enumerate(variants(tokenizer, tmp_path)):
        special = random_text(number, 6000)
        for text in (special, special.replace("<|eos|>", "eos")):
            parts = split_text(built, text, size=300)
            assert "".join(parts) == text
            assert np.array_equal(np.concatenate(built.encode_batch(parts)), built.encode_batch([text])[0])
        cuts.append(len(parts))
    assert cuts[0] > 20 and cuts[1] > 20  # GPT-2's and Llama 3's way of splitting words
    assert cuts[2] == cuts[5] == cuts[6] == 1  # every text gets a space or mark of its own in front
