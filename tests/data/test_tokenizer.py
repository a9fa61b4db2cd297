"""Tokenizer folders: round trips, BOS rules, training, and folders that are damaged or hostile."""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

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
@given(text=st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: BOS not in text and EOS not in text))
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


@pytest.mark.parametrize(
    ("bos", "eos", "ends"), [(True, True, (0, 1)), (None, False, (0, None)), (False, True, (None, 1))]
)
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
    ("config", "post_processor", "uses"),
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
    assert tokenizer.warnings == []


@pytest.mark.parametrize(
    ("files", "bos", "stops", "warning"),
    [
        ({"generation_config": {"eos_token_id": [1, 999999]}}, None, (1,), "eos_token_id: 999999 is not a token (0 to"),
        ({"generation_config": {"bos_token_id": -1}}, None, (), "bos_token_id: -1 is not a token (0 to"),
        ({"generation_config": {"pad_token_id": 999999, "eos_token_id": 1}}, None, (1,), ""),  # never read
        ({"tokenizer_config": {"bos_token": "<s>", "eos_token": "<|eos|>"}}, None, (1,), "bos_token: '<s>' is not a"),
        ({"config": {"bos_token_id": 50256, "eos_token_id": 50256}}, None, (), ""),  # the defaults of GPT2Config
    ],
)
def test_special_tokens_that_the_tokenizer_lacks_are_left_out(
    folders: dict[str, Path], tmp_path: Path, files: dict[str, Any], bos: int | None, stops: Any, warning: str
) -> None:
    tokenizer = with_files(tmp_path / "t", folders["bpe"], post_processor=False, **files)
    assert (tokenizer.bos_id, tokenizer.stop_ids) == (bos, stops)
    assert len(tokenizer.warnings) == bool(warning) and warning in "".join(tokenizer.warnings)


def test_a_special_token_id_must_be_a_number(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id: 'x' is not a token id"):
        with_files(tmp_path / "t", folders["bpe"], post_processor=False, generation_config={"eos_token_id": "x"})


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
        reference, tokenizer = AutoTokenizer.from_pretrained(folder), Tokenizer(folder)
        for text in [*TEXT, "", "  \n x"]:
            assert reference(text)["input_ids"] == tokenizer.encode(text).tolist()


def test_fingerprint_sees_the_bos_rule(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["bpe"], tmp_path / "t")
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(SPECIAL | {"add_bos_token": False}))
    assert Tokenizer(tmp_path / "t").fingerprint() != Tokenizer(folders["bpe"]).fingerprint()


@pytest.mark.parametrize(("kind", "size", "key"), [("bpe", 100, "vocab_size"), ("words", 300, "kind")])
def test_training_refuses(tmp_path: Path, kind: str, size: int, key: str) -> None:
    with pytest.raises(UserError, match=f"^{key}: "):
        train_tokenizer(TEXT, kind, size, tmp_path / "t")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has neither tokenizer"):
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


@pytest.fixture(scope="module")
def pieces_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small sentencepiece model of the kind that Llama 2 has: byte-pair, with bytes for what it does not know."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "text").write_text("\n".join(TEXT * 10), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return folder


def with_config(source: Path, folder: Path, config: dict[str, object]) -> Tokenizer:
    folder.mkdir()
    shutil.copy(source / "tokenizer.model", folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(folder)


LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
MARKED = [
    "<s>the fox</s>",
    "the dog</s> and</s>the fox",
    "</s> a",
    "fox <unk> dog",
    "<s><s>x</s>\n\ndog 日本",
    "",
    "a dog",
    "日本語 wörter 🦊",
]


@pytest.mark.parametrize("legacy", [False, True])
def test_special_tokens_in_sentencepiece_text_equal_transformers(
    pieces_folder: Path, tmp_path: Path, legacy: bool
) -> None:
    from transformers import LlamaTokenizer

    tokenizer = with_config(pieces_folder, tmp_path / "t", LLAMA | {"legacy": legacy, "add_bos_token": True})
    reference = LlamaTokenizer.from_pretrained(tmp_path / "t", legacy=legacy)
    for text in MARKED:
        assert tokenizer.encode(text, bos=False).tolist() == reference(text, add_special_tokens=False)["input_ids"], (
            text
        )
    assert [ids.tolist() for ids in tokenizer.encode_batch(MARKED)] == [
        tokenizer.encode(t, bos=False).tolist() for t in MARKED
    ]


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\u2581<")))
def test_any_text_comes_back_from_sentencepiece(pieces_folder: Path, text: str) -> None:
    tokenizer = Tokenizer(pieces_folder)
    tokens = tokenizer.encode(text, bos=False).tolist()
    whole = tokenizer.decode(tokens)
    assert whole == text
    assert "".join(tokenizer.decode_stream(tokens)) == whole


def test_tokens_added_to_sentencepiece(pieces_folder: Path, tmp_path: Path) -> None:
    added = {"340": {"content": "<|im_end|>", "special": True}, "341": {"content": "<tool>", "special": False}}
    config = LLAMA | {"eos_token": {"content": "<|im_end|>"}, "added_tokens_decoder": added}
    tokenizer = with_config(pieces_folder, tmp_path / "t", config)
    assert (tokenizer.eos_id, tokenizer.vocab_size, tokenizer.id_limit) == (340, 340, 342)
    tokens = tokenizer.encode("the fox<tool> dog<|im_end|>", bos=False).tolist()
    assert tokens[-1] == 340 and tokens.count(341) == 1
    assert tokenizer.decode([*tokens, 999]) == "the fox<tool> dog"
    assert "".join(tokenizer.decode_stream(tokens)) == "the fox<tool> dog"
    assert tokenizer.token_to_id("<tool>") == 341 and tokenizer.token_to_id("<unk>") == 0
    bare = with_config(pieces_folder, tmp_path / "bare", LLAMA)
    assert bare.fingerprint() != tokenizer.fingerprint()
    (tmp_path / "bare" / "added_tokens.json").write_text('{"<tool>": "x"}')
    with pytest.raises(UserError, match=r"added_tokens\.json"):
        Tokenizer(tmp_path / "bare")


def test_missing_sentencepiece_is_one_line(pieces_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(
        UserError, match=r"tokenizer\.model: sentencepiece is not installed: pip install .litgpt\[data\]."
    ):
        Tokenizer(pieces_folder)


@pytest.mark.parametrize(
    ("config", "uses"),
    [(SPECIAL | {"add_eos_token": True}, True), (SPECIAL | {"add_eos_token": False}, False), (SPECIAL, False)],
)
def test_eos_rule_is_read_from_the_files(
    folders: dict[str, Path], tmp_path: Path, config: dict[str, object], uses: bool
) -> None:
    tokenizer = with_files(tmp_path / "t", folders["bpe"], post_processor=True, tokenizer_config=config)
    assert tokenizer.use_eos is uses
    assert (tokenizer.encode("a", eos=None).tolist()[-1] == 1) is uses
    assert tokenizer.encode("a").tolist()[-1] != 1  # only where it is asked for: a prompt goes on


def test_eos_rule_of_a_post_processor(folders: dict[str, Path], tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import processors

    shutil.copytree(folders["bpe"], tmp_path / "t")
    backend = Backend.from_file(str(tmp_path / "t" / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, 1)])
    backend.enable_truncation(2)
    backend.save(str(tmp_path / "t" / "tokenizer.json"))
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(SPECIAL))
    tokenizer = Tokenizer(tmp_path / "t")
    assert (tokenizer.use_bos, tokenizer.use_eos) == (False, True)
    assert len(tokenizer.encode("a fox and a dog", eos=None)) > 3  # the truncation of whoever made the file is not ours


def test_every_token_that_ends_a_text(folders: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = with_files(
        tmp_path / "t",
        folders["bpe"],
        post_processor=False,
        tokenizer_config=SPECIAL,
        generation_config={"eos_token_id": [9, 1, 7]},
    )
    assert tokenizer.stop_ids == (1, 9, 7)
    (tmp_path / "t" / "generation_config.json").unlink()
    (tmp_path / "t" / "config.json").write_text(json.dumps({"eos_token_id": [3, 99_999]}))  # the latter: no token here
    assert Tokenizer(tmp_path / "t").stop_ids == (1, 3)


def test_a_stream_behind_a_prompt_begins_with_its_space(pieces_folder: Path) -> None:
    tokenizer = Tokenizer(pieces_folder)
    prompt, both = tokenizer.encode("the fox").tolist(), tokenizer.encode("the fox jumps").tolist()
    assert both[: len(prompt)] == prompt
    assert "".join(tokenizer.decode_stream(both[len(prompt) :], context=prompt)) == " jumps"
    assert "".join(tokenizer.decode_stream(both[len(prompt) :])) == "jumps"


def real_texts() -> list[str]:
    """Two hundred texts: prose, code, numbers, scripts, spaces, emoji, marks, and what breaks tokenizers."""
    import pydoc_data.topics as topics

    pages = list(topics.topics.values())
    texts = [page[start : start + 160] for page in pages[:60] for start in (0, 700)]
    odd = [
        "",
        " ",
        "  ",
        "\n",
        "\n\n\n",
        "\t\tx",
        "a  b   c    d",
        " lead",
        "trail ",
        "\r\n",
        "\u00a0x\u3000y",
        "e\u0301é",
    ]
    odd += ["日本語のテキスト", "你好，世界", "한국어 문장", "العربية", "हिन्दी", "русский язык", "ไทย", "ελληνικά"]
    odd += [
        "🤗🦊👩‍👩‍👧‍👦🇫🇷",
        "x = {'a': [1, 2.5e-3]}  # c",
        "3.14159 1,000,000 12345678901234567890",
        "I'll we're DON'T",
    ]
    odd += [
        "<s>",
        "</s>",
        "<|im_start|>user\nhi<|im_end|>",
        "<bos>a<eos>",
        "<|endoftext|>",
        "[INST] x [/INST]",
        "<think>",
    ]
    odd += [
        "http://a.b/c?d=e&f#g",
        "ſ ﬁ Ⅷ ½ ™",
        "\u200b\u200d\ufeff",
        "\ufffd",
        "\x00\x01\x7f",
        "a" * 300,
        "aA" * 50,
        "_-" * 40,
    ]
    generator = random.Random(0)
    alphabet = "abc XYZ.,'\n0129éß中🙂\u2581"
    odd += ["".join(generator.choices(alphabet, k=40)) for _ in range(200 - len(texts) - len(odd))]
    return texts + odd


REAL = ["qwen3", "llama3", "gemma3", "deepseek_v3", "gptoss"]


def asset(name: str) -> Path:
    root = os.environ.get("LITGPT_TEST_ASSETS")
    if not root or not (Path(root) / name).exists():
        pytest.skip(f"LITGPT_TEST_ASSETS names no folder with {name}")
    return Path(root) / name


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers_equal_transformers(name: str) -> None:
    from transformers import AutoTokenizer

    folder = asset(f"tok/{name}")
    tokenizer, reference = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    texts = real_texts()
    assert len(texts) >= 200
    for text in texts:
        wanted = reference(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.encode(text, bos=False).tolist() == wanted, text
        assert tokenizer.decode(wanted) == reference.decode(wanted, skip_special_tokens=True)
        assert "".join(tokenizer.decode_stream(wanted)) == tokenizer.decode(wanted)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (reference.bos_token_id, reference.eos_token_id)
    if name != "deepseek_v3":  # its tokenizer_config.json says add_bos_token: true, which transformers 5 does not read
        assert tokenizer.encode("a text", eos=None).tolist() == reference("a text")["input_ids"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3", "mistral_instruct_tokenizer_241114.model.v7"],
)
def test_real_sentencepiece_models(name: str, tmp_path: Path) -> None:
    """Against sentencepiece itself, and transformers where that keeps to the file.

    Transformers 5.23 ranks merges by number, not by score, so that it joins runs of spaces first where these models
    join them last, and puts no space before a text that begins with one.
    """
    sentencepiece = pytest.importorskip("sentencepiece")
    from transformers import LlamaTokenizer

    shutil.copy(asset(f"tok/mistral_common/data/{name}"), tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(LLAMA | {"add_bos_token": True, "legacy": False}))
    tokenizer = Tokenizer(tmp_path)
    reference = LlamaTokenizer.from_pretrained(tmp_path)
    source = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    compared = 0
    for text in real_texts():
        tokens = tokenizer.encode(text, bos=False).tolist()
        if not any(mark in text for mark in tokenizer._sentencepiece.special):
            assert tokens == source.encode(text), text
        if "  " not in text and text[:1] != " " and not {"\u2581", "\0"} & set(text):
            compared += 1
            assert tokens == reference(text, add_special_tokens=False)["input_ids"], text
            assert tokenizer.decode(tokens) == reference.decode(tokens, skip_special_tokens=True)
        assert "".join(tokenizer.decode_stream(tokens)) == tokenizer.decode(tokens)
    assert compared > 80
    assert tokenizer.encode("a text").tolist() == reference("a text")["input_ids"]
