"""Tokenizer folders: round trips, BOS rules, training, and folders that are damaged or hostile."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from litgpt.data.tokenizer import BOS, EOS, Tokenizer, train_tokenizer
from litgpt.errors import UserError

TEXT = ["the quick brown fox jumps over the lazy dog. " * 20, "a dog and a fox, 日本語 and wörter\n\n" * 10]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    for kind in ("bpe", "bytes"):
        train_tokenizer(TEXT, kind, 320, root / kind)
    return {kind: root / kind for kind in ("bpe", "bytes")}


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(folders: dict[str, Path], kind: str, text: str) -> None:
    tokenizer = Tokenizer(folders[kind])
    tokens = tokenizer.encode(text)
    assert tokens.dtype == torch.int32 and tokens[0] == tokenizer.bos_id
    assert tokenizer.decode(tokens) == text
    assert "".join(tokenizer.decode_stream(tokens.tolist())) == text
    if kind == "bytes":
        assert len(tokens) == 1 + len(text.encode())


def test_batch_is_the_same_as_one_by_one(folders: dict[str, Path]) -> None:
    tokenizer = Tokenizer(folders["bpe"])
    for text, tokens in zip(TEXT, tokenizer.encode_batch(TEXT), strict=True):
        assert tokens.tolist() == tokenizer.encode(text, bos=False).tolist()


@pytest.mark.parametrize("bos, eos, ends", [(True, True, (0, 1)), (None, False, (0, None)), (False, True, (None, 1))])
def test_framing(folders: dict[str, Path], bos: bool | None, eos: bool, ends: tuple[int | None, int | None]) -> None:
    tokenizer = Tokenizer(folders["bpe"])
    plain = tokenizer.encode("a fox", bos=False).tolist()
    expected = [ends[0]] * (ends[0] is not None) + plain + [ends[1]] * (ends[1] is not None)
    assert tokenizer.encode("a fox", bos=bos, eos=eos).tolist() == expected
    assert tokenizer.encode("a fox", bos=bos, eos=eos, max_length=2).tolist() == expected[:2]
    assert tokenizer.encode(BOS + "a fox", bos=True).tolist() == [0, *plain]  # spelled out already: no second one


def with_files(folder: Path, source: Path, *, post_processor: bool, **files: object) -> Tokenizer:
    shutil.copytree(source, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    if not post_processor:
        content["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").unlink()
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return Tokenizer(folder)


SPECIAL = {"bos_token": BOS, "eos_token": {"content": EOS}}


@pytest.mark.parametrize(
    "config, post_processor, uses",
    [
        (SPECIAL | {"add_bos_token": True}, False, True),
        (SPECIAL | {"add_bos_token": False}, True, False),
        (SPECIAL | {"add_bos_token": None}, True, True),
        (SPECIAL, True, True),  # Llama 3 says it in its post-processor only
        (SPECIAL, False, False),
        (SPECIAL | {"tokenizer_class": "LlamaTokenizer"}, False, True),
        ({"eos_token": EOS, "add_bos_token": True}, False, False),  # nothing to add
    ],
)
def test_bos_rule_is_read_from_the_files(
    folders: dict[str, Path], tmp_path: Path, config: dict[str, object], post_processor: bool, uses: bool
) -> None:
    tokenizer = with_files(tmp_path / "t", folders["bpe"], post_processor=post_processor, tokenizer_config=config)
    assert tokenizer.use_bos is uses
    assert tokenizer.eos_id == 1
    assert (tokenizer.encode("a").tolist()[0] == 0) is uses


def test_special_tokens_from_generation_config(folders: dict[str, Path], tmp_path: Path) -> None:
    generation = {"bos_token_id": 0, "eos_token_id": [1, 0]}
    tokenizer = with_files(tmp_path / "t", folders["bpe"], post_processor=False, generation_config=generation)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.use_bos) == (0, 1, False)
    with pytest.raises(UserError, match=r"generation_config\.json.*999999"):
        with_files(tmp_path / "u", folders["bpe"], post_processor=False, generation_config={"bos_token_id": 999999})


def test_bos_on_request_without_one_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = with_files(tmp_path / "t", folders["bpe"], post_processor=False)
    with pytest.raises(UserError, match="no bos token"):
        tokenizer.encode("a", bos=True)
    with pytest.raises(UserError, match="no token '<nothing>'"):
        tokenizer.token_to_id("<nothing>")


def test_training_is_deterministic(folders: dict[str, Path], tmp_path: Path) -> None:
    again = train_tokenizer(iter(TEXT), "bpe", 320, tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (folders["bpe"] / "tokenizer.json").read_bytes()
    assert again.fingerprint() == Tokenizer(folders["bpe"]).fingerprint() != Tokenizer(folders["bytes"]).fingerprint()
    assert 258 < again.vocab_size <= 320 and again.id_limit == again.vocab_size
    assert Tokenizer(folders["bytes"]).vocab_size == 258


def test_transformers_reads_the_folder_alike(folders: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    for folder in folders.values():
        theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer(folder)
        for text in [*TEXT, "", "  \n x"]:
            assert theirs(text)["input_ids"] == ours.encode(text).tolist()


def test_fingerprint_sees_the_bos_rule(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["bpe"], tmp_path / "t")
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(SPECIAL | {"add_bos_token": False}))
    assert Tokenizer(tmp_path / "t").fingerprint() != Tokenizer(folders["bpe"]).fingerprint()


@pytest.mark.parametrize("kind, size, key", [("bpe", 100, "vocab_size"), ("words", 300, "kind")])
def test_training_refuses(tmp_path: Path, kind: str, size: int, key: str) -> None:
    with pytest.raises(UserError, match=f"tokenizer.{key}"):
        train_tokenizer(TEXT, kind, size, tmp_path / "t")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tokenizer_dir"):
        Tokenizer(tmp_path)


def test_damaged_files_end_in_one_line(folders: dict[str, Path], tmp_path: Path) -> None:
    """Bytes flipped, cut and swapped in either file: it loads or says what is wrong, nothing else."""
    generator = random.Random(0)
    refused = 0
    for trial in range(120):
        folder = tmp_path / str(trial)
        shutil.copytree(folders["bpe"], folder)
        path = folder / generator.choice(["tokenizer.json", "tokenizer.json", "tokenizer_config.json"])
        content = bytearray(path.read_bytes())
        place = generator.randrange(len(content))
        if trial % 2:
            content[place] = generator.randrange(256)
        else:
            del content[place:]
        path.write_bytes(content)
        try:
            Tokenizer(folder).encode("the fox")
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and (str(folder) in str(error))
    assert refused > 40


def test_hostile_folder_runs_nothing(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pickle in every place a tokenizer is read from, and code named in its settings: none of it is run."""
    import os
    import pickle

    witness = tmp_path / "ran"
    monkeypatch.setenv("WITNESS", str(witness))

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, ('touch "$WITNESS"',)

    bomb = pickle.dumps(Bomb())
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        folder = tmp_path / name
        folder.mkdir()
        if name.endswith("config.json"):
            shutil.copy(folders["bpe"] / "tokenizer.json", folder)
        (folder / name).write_bytes(bomb)
        with pytest.raises(UserError):
            Tokenizer(folder)
    code = "import os; os.system('touch \"$WITNESS\"')"
    config = SPECIAL | {"auto_map": {"AutoTokenizer": ["code.Bomb", None]}, "chat_template": "{{ cycler.__init__ }}"}
    shutil.copytree(folders["bpe"], tmp_path / "auto")
    (tmp_path / "auto" / "code.py").write_text(code)
    (tmp_path / "auto" / "tokenizer_config.json").write_text(json.dumps(config))
    Tokenizer(tmp_path / "auto").encode("a")
    assert not witness.exists()
    pickle.loads(bomb)
    assert witness.exists()  # the bomb was live


def test_sentencepiece_folder(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text("\n".join(TEXT * 10))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=40, minloglevel=2
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size, tokenizer.use_bos) == (1, 2, 40, True)
    tokens = tokenizer.encode("the quick brown fox", eos=True)
    assert (tokens[0], tokens[-1]) == (1, 2) and tokenizer.decode(tokens) == "the quick brown fox"
    assert "".join(tokenizer.decode_stream(tokens.tolist())) == "the quick brown fox"
    assert tokenizer.token_to_id("</s>") == 2
    with pytest.raises(UserError, match="no token"):
        tokenizer.token_to_id("<nothing>")
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"tokenizer\.model: not a sentencepiece model"):
        Tokenizer(tmp_path)
