"""The named data modules, and the commands that prepare and show them."""

import io
import itertools
import json
import subprocess
import sys
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt import data
from litgpt.commands import data_inspect, data_prepare, tokenizer_train
from litgpt.data import LitData, MicroLlama, OpenWebText, PythonDocs, TextFiles, TinyLlama, TinyStories
from litgpt.data.read import downloads
from litgpt.data.read.python_docs import read_python_docs
from litgpt.data.tokenizer import Tokenizer, train_tokenizer
from litgpt.errors import UserError
from litgpt.recipe.data import DATA_MODULES, BatchShape, DataModule
from litgpt.recipe.data_commands import DataInspect, DataPrepare, TokenizerTrain

SHAPE = BatchShape(2, 4, 16)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer([], "bytes", 258, tmp_path_factory.mktemp("tok") / "bytes")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("validation text " * 10)
    (folder / "b.txt").write_text("training text " * 10)
    (folder / "c.jsonl").write_text('{"text": "row one is here"}\n{"text": "row two"}\n')
    return folder


def opened(module: Any, tokenizer: Tokenizer | None) -> Any:
    module.connect(tokenizer, 2, 16)
    module.prepare_data()
    module.setup()
    return module


def text_of(tokens: Any, tokenizer: Tokenizer) -> list[str]:
    starts = [*tokens.find_document_starts(0, tokens.total).tolist(), tokens.total]
    parts = [tokens.read(begin, end).tolist() for begin, end in itertools.pairwise(starts)]
    assert all(part[0] == tokenizer.bos_id and tokenizer.eos_id not in part for part in parts)
    return [tokenizer.decode(part) for part in parts]


def test_first_file_is_validation(texts: Path, tokenizer: Tokenizer) -> None:
    module = opened(TextFiles(texts), tokenizer)
    assert text_of(module.val_tokens, tokenizer) == ["validation text " * 10]
    assert text_of(module.train_tokens, tokenizer) == ["training text " * 10, "row one is here", "row two"]
    assert module.train_tokens.folder.parent == texts / ".litgpt-tokens"
    assert list(module.training_documents()) == ["training text " * 10, "row one is here", "row two"]
    assert next(iter(module.train_stream(SHAPE))).ids.shape == (2, 16)
    assert sum(batch.targets for batch in module.val_stream(SHAPE)) == 160  # every token but the first is predicted


def test_val_path_and_cache_dir(texts: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    module = opened(TextFiles(texts, val_data_path=texts / "c.jsonl", cache_dir=tmp_path / "cache"), tokenizer)
    assert module.train_tokens.documents == 4 and module.val_tokens.documents == 2
    assert module.train_tokens.folder.parent == tmp_path / "cache" and not (texts / ".litgpt-tokens").exists()


def test_changed_file_is_read_again(texts: Path, tokenizer: Tokenizer) -> None:
    first = opened(TextFiles(texts), tokenizer)
    state = first.train_stream(SHAPE).state_dict()
    (texts / "b.txt").write_text("training tale " * 10)
    second = opened(TextFiles(texts), tokenizer)
    assert "training tale " * 10 in text_of(second.train_tokens, tokenizer)
    with pytest.raises(UserError, match="another data set"):
        second.train_stream(SHAPE).load_state_dict(state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_data_path": "absent"}, r"data\.train_data_path: .*absent"),
        ({"val_data_path": "absent"}, r"data\.val_data_path: .*absent"),
        ({"num_workers": -1}, r"data\.num_workers: -1"),
        ({"seed": -1}, r"data\.seed: -1"),
    ],
)
def test_wrong_settings_name_their_key(
    texts: Path, tokenizer: Tokenizer, settings: dict[str, Any], message: str
) -> None:
    paths = {name: texts / value for name, value in settings.items() if isinstance(value, str)}
    with pytest.raises(UserError, match=message):
        opened(TextFiles(**{"train_data_path": texts} | settings | paths), tokenizer)


def test_one_file_needs_a_val_path(texts: Path, tokenizer: Tokenizer) -> None:
    for name in ("b.txt", "c.jsonl"):
        (texts / name).unlink()
    with pytest.raises(UserError, match=r"data\.train_data_path: .*; add a second, or set data\.val_data_path"):
        opened(TextFiles(texts), tokenizer)
    with pytest.raises(UserError, match="tokenizer_dir: missing"):
        opened(TextFiles(texts), None)


def test_bad_row_stops_or_is_counted(texts: Path, tokenizer: Tokenizer) -> None:
    with (texts / "c.jsonl").open("a") as file:
        file.write("{not json}\n")
    with pytest.raises(UserError, match=r"c\.jsonl:3: "):
        opened(TextFiles(texts), tokenizer)
    module = opened(TextFiles(texts, bad_rows="skip"), tokenizer)
    assert module.train_tokens.metadata["skipped"] == 1 and "c.jsonl:3" in module.train_tokens.metadata["first_skipped"]
    assert module.train_tokens.documents == 3


def test_validation_too_short_says_so(texts: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    (texts / "a.txt").write_text("short")
    assert opened(TextFiles(texts), tokenizer).val_stream(SHAPE) is None
    assert "no validation: its 6 tokens" in capsys.readouterr().err


def test_document_mask_and_seed_reach_the_stream(texts: Path, tokenizer: Tokenizer) -> None:
    streams = [
        opened(TextFiles(texts, document_mask=masked, seed=seed), tokenizer).train_stream(SHAPE)
        for masked, seed in ((True, 42), (False, 42), (False, 43))
    ]
    masked, plain, other = [list(itertools.islice(stream, 5)) for stream in streams]
    assert any(batch.documents.max() > 0 for batch in masked) and plain[0].documents is None
    assert torch.equal(masked[0].ids, plain[0].ids) and not torch.equal(plain[0].ids, other[0].ids)
    module = opened(TextFiles(texts, document_mask=True), tokenizer)
    assert all(batch.documents is not None for batch in module.val_stream(SHAPE))


def test_python_docs(python_docs: Path) -> None:
    module = PythonDocs(python_docs)
    train, val = ([*corpus.documents(lambda file: file, None)] for corpus in module.build_corpora())  # type: ignore[arg-type]
    size = sum(map(len, train))
    assert 1_000_000 < size < 5_000_000 and 0.02 < sum(map(len, val)) / size < 0.2
    assert len(train) + len(val) == len(set(train) | set(val))
    assert set(itertools.islice(read_python_docs(), 150)) <= {*train, *val}  # read once more: the same


def chunk_folder(folder: Path, first: int, documents: int) -> None:
    from litdata.streaming.item_loader import TokensLoader
    from litdata.streaming.writer import BinaryWriter

    folder.mkdir(parents=True)
    writer = BinaryWriter(str(folder), chunk_bytes=2000, item_loader=TokensLoader())
    for number in range(documents):
        writer[number] = torch.arange(first + 100 * number, first + 100 * number + 90, dtype=torch.int)
    writer.done()
    writer.merge()


@pytest.fixture(scope="module")
def slimpajama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tinyllama")
    chunk_folder(root / "slimpajama" / "train", 0, 20)
    chunk_folder(root / "slimpajama" / "val", 20_000, 3)
    chunk_folder(root / "starcoder", 10_000, 10)
    return root


def test_tinyllama_mixes_and_microllama_does_not(slimpajama: Path) -> None:
    batches = list(itertools.islice(opened(TinyLlama(slimpajama), None).train_stream(SHAPE), 500))
    code = sum(int(row[0]) >= 10_000 for batch in batches for row in batch.ids) / 1000
    assert abs(code - 0.306416) < 0.002
    plain = opened(MicroLlama(slimpajama), None).train_stream(SHAPE)
    assert all(int(batch.ids.max()) < 10_000 for batch in itertools.islice(plain, 200))
    val = opened(MicroLlama(slimpajama), None).val_stream(SHAPE)
    assert sum(batch.targets for batch in val) == 3 * 90 // 16 * 16 - 16 * (3 * 90 % 16 == 0)


def test_litdata_local_folder(slimpajama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = opened(LitData(slimpajama, ("slimpajama/train", "slimpajama/val"), document_mask=True), None)
    batch = next(iter(module.train_stream(SHAPE)))
    for ids, numbers in zip(batch.ids, batch.documents, strict=True):  # documents are hundreds apart
        assert torch.equal(ids // 100 - ids[0] // 100, numbers)
    assert next(iter(module.val_stream(SHAPE))).ids.min() >= 20_000
    alone = opened(LitData(slimpajama / "starcoder"), None)
    assert alone.val_stream(SHAPE) is None and "data.split_names" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"data\.data_path: .*no index\.json"):
        opened(LitData(slimpajama), None)


@pytest.mark.parametrize("workers", [0, 2])
def test_litdata_streams_what_it_must(slimpajama: Path, workers: int) -> None:
    """The path that remote folders take, with local ones: shares kept, exact continuation."""
    from litgpt.data.modules.litdata import _open_litdata_stream

    module = TinyLlama(slimpajama, num_workers=workers)
    open_stream = partial(_open_litdata_stream, module.train_folders(), module, SHAPE, repeat=True)
    whole = [batch.ids for batch in itertools.islice(open_stream(), 40)]
    assert 0.1 < sum(int(row[0]) >= 10_000 for ids in whole for row in ids) / 80 < 0.5
    first, second = open_stream(), open_stream()
    list(itertools.islice(first, 9))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for expected, batch in zip(whole[9:20], second, strict=False):
        assert torch.equal(expected, batch.ids)
    with pytest.raises(UserError, match="document_mask"):
        _open_litdata_stream(module.train_folders(), TinyLlama(slimpajama, document_mask=True), SHAPE, repeat=True)


def stories_archive(folder: Path) -> None:
    folder.mkdir()
    with tarfile.open(folder / "TinyStories_all_data.tar.gz", "w:gz") as archive:
        for name, rows in (("data01.json", ["b", "c"]), ("data00.json", [" a "]), ("../evil.json", ["x"])):
            content = json.dumps([{"story": f"{row} tale that goes on"} for row in rows]).encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_tinystories_from_the_archive(tmp_path: Path, tokenizer: Tokenizer) -> None:
    stories_archive(tmp_path / "stories")
    module = opened(TinyStories(tmp_path / "stories"), tokenizer)
    assert text_of(module.train_tokens, tokenizer) == ["b tale that goes on", "c tale that goes on"]
    assert text_of(module.val_tokens, tokenizer) == ["a  tale that goes on"]
    assert not (tmp_path / "evil.json").exists()
    archive = tmp_path / "stories" / "TinyStories_all_data.tar.gz"
    archive.write_bytes(archive.read_bytes()[:150])
    with pytest.raises(UserError, match=r"TinyStories_all_data.tar.gz: damaged"):
        opened(TinyStories(tmp_path / "stories"), tokenizer)


def test_openwebtext_from_parquet(tmp_path: Path, tokenizer: Tokenizer) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder = tmp_path / "parquet" / "plain_text"
    folder.mkdir(parents=True)
    rows = [f"page {number} of the web" for number in range(200)]
    for part in range(2):
        parquet.write_table(pyarrow.table({"text": rows[part::2]}), folder / f"train-{part}.parquet")
    (tmp_path / "parquet" / "complete").touch()
    module = opened(OpenWebText(tmp_path, val_split_fraction=0.1), tokenizer)
    train, val = module.train_tokens, module.val_tokens
    assert train.documents + val.documents == 200 and 5 < val.documents < 40
    assert (train.read(0, train.total) == tokenizer.eos_id).sum() == train.documents
    (folder / "train-0.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"train-0\.parquet: damaged"):
        opened(OpenWebText(tmp_path, val_split_fraction=0.2), tokenizer)


def test_offline_is_one_line(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "TINYSTORIES", "http://127.0.0.1:9/nothing.tar.gz")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for module in (TinyStories(tmp_path / "a"), OpenWebText(tmp_path / "b")):
        with pytest.raises(UserError, match="cannot be downloaded") as caught:
            opened(module, tokenizer)
        assert "\n" not in str(caught.value)
    assert not list((tmp_path / "a").iterdir())


def test_names_and_imports() -> None:
    for name, path in DATA_MODULES.items():
        assert issubclass(getattr(data, name), DataModule) and path == f"litgpt.data.{name}"
    program = (
        "import sys; from litgpt.data import TextFiles; print({'torch', 'litdata', 'numpy', 'rich'} & {*sys.modules})"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "set()"


def test_commands(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer_train.run(TokenizerTrain(texts, tmp_path / "tok", vocab_size=280))
    folder = tmp_path / "tok"
    data_prepare.run(DataPrepare(TextFiles(texts), folder, 16))
    printed = capsys.readouterr().out
    assert str(texts / ".litgpt-tokens") in printed and "280" in printed and "windows" in printed
    data_inspect.run(DataInspect(TextFiles(texts), folder, 16, samples=2))
    render_tokens = capsys.readouterr().out
    assert "row" in render_tokens and "──── document 2 ────" in render_tokens
    data_inspect.run(DataInspect(TextFiles(texts), folder, 16, split="val", samples=1))
    assert "valid" in capsys.readouterr().out
    for tokens in (texts / ".litgpt-tokens").glob("*/tokens.bin"):
        content = bytearray(tokens.read_bytes())
        content[5] ^= 1
        tokens.write_bytes(content)
    with pytest.raises(UserError, match=r"tokens\.bin: the file is damaged"):
        data_prepare.run(DataPrepare(TextFiles(texts), folder, 16))


def test_paths_that_are_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = TinyLlama(Path("s3://bucket/tokens/"))  # a Path makes one slash of two
    assert [folder for folder, _ in module.train_folders()] == [
        "s3://bucket/tokens/slimpajama/train",
        "s3://bucket/tokens/starcoder",
    ]
    assert LitData("s3://bucket").train_folders() == [("s3://bucket", 1.0)]
    assert LitData(tmp_path, ("a", "b")).val_folder() == str(tmp_path / "b")

    def refuse(*_arguments: object, **_settings: object) -> None:
        raise RuntimeError("no\ncredentials")

    monkeypatch.setattr("litdata.streaming.StreamingDataset", refuse)
    with pytest.raises(UserError, match=r"data\.data_path: s3://bucket cannot be streamed \(no credentials\)"):
        opened(LitData("s3://bucket"), None).train_stream(SHAPE)
