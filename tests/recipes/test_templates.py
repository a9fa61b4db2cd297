"""The templates run as their page says, with small models and data; interrupted, they continue where they were."""

import importlib.util
import shutil
from collections import Counter
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from litgpt.data.cache.litdata_chunks import ChunkFolder
from litgpt.data.tokenizer import Tokenizer
from tests.recipes.test_tutorials import (
    SHAPE,
    make_document,
    read_blocks,
    run_block,
    write_inputs,
    write_model,
    write_programs,
)
from tests.runs import write_text

pytestmark = pytest.mark.slow
TEMPLATES = Path(__file__).parents[2] / "tutorials" / "templates"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with the raw data, the tokenizer, the text and the published model that the templates read."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    write_inputs(tmp_path, shape=SHAPE)
    write_model(tmp_path / "checkpoints" / "TinyLlama" / "TinyLlama-1.1B-intermediate-step-1431k-3T", SHAPE)
    (tmp_path / "starcoder-raw").mkdir()
    for number in range(2):
        rows = [make_document(100 * number + row) for row in range(10)]
        parquet.write_table(pyarrow.table({"content": rows}), tmp_path / "starcoder-raw" / f"{number}.parquet")
    write_text(tmp_path)
    (tmp_path / "litgpt" / "tutorials").mkdir(parents=True)
    (tmp_path / "litgpt" / "tutorials" / "templates").symlink_to(TEMPLATES)
    return tmp_path


def load_script(monkeypatch: pytest.MonkeyPatch, *argv: str) -> ModuleType:
    """The module of prepare.py, which starts its processes as forks, with the arguments of a command line."""
    spec = importlib.util.spec_from_file_location("prepare", TEMPLATES / "prepare-tinyllama-data" / "prepare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "optimize", partial(module.optimize, start_method="fork"))
    monkeypatch.setattr("sys.argv", ["prepare.py", "--slimpajama", "slimpajama-raw", "--chunk_bytes", "16KB", *argv])
    return module


def count_documents(folder: Path, tokenizer: Tokenizer) -> Counter[str]:
    """The texts in a chunk folder, and how often each is there."""
    chunks = ChunkFolder(folder)
    tokens = np.asarray(chunks.read(0, chunks.total))
    *documents, rest = np.split(tokens, np.flatnonzero(tokens == tokenizer.eos_id) + 1)
    assert len(rest) == 0
    return Counter(tokenizer.decode(document[:-1]) for document in documents)


def test_an_interrupted_preparation_converts_what_is_left(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for number in range(1, 4):
        shutil.copy("slimpajama-raw/train/0.jsonl.zst", f"slimpajama-raw/train/{number}.jsonl.zst")
    script = load_script(monkeypatch, "--group", "2", "--workers", "2")
    optimize, converted = script.optimize, list[str]()

    def convert(function: Any, files: list[str], *, lost: bool = False, **settings: Any) -> None:
        optimize(function, files, **settings)
        if lost and converted:
            raise KeyboardInterrupt
        converted.extend(Path(path).name for path in files)

    monkeypatch.setattr(script, "optimize", partial(convert, lost=True))
    with pytest.raises(KeyboardInterrupt):
        script.main()
    assert converted == ["0.jsonl.zst", "1.jsonl.zst"] and not Path("data/slimpajama").exists()
    script = load_script(monkeypatch, "--group", "2", "--workers", "1")
    monkeypatch.setattr(script, "optimize", convert)
    script.main()
    assert converted == [f"{number}.jsonl.zst" for number in (0, 1, 2, 3, 0)]
    tokenizer = Tokenizer(Path("checkpoints/meta-llama/Llama-2-7b-hf"))
    once = Counter(make_document(seed) for seed in range(20))
    assert count_documents(Path("data/slimpajama/val"), tokenizer) == once
    assert count_documents(Path("data/slimpajama/train"), tokenizer) == Counter({text: 4 * once[text] for text in once})
    assert not [*Path("data/parts").rglob("*.bin")]
    script.main()
    assert len(converted) == 5


def test_commands_of_the_page_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    load_script(monkeypatch).main()  # SlimPajama is then complete, and the page's command converts StarCoder
    server = write_programs(folder / "bin", shrunk=True)
    prepare, pretrain, continue_pretraining = read_blocks(TEMPLATES / "README.md")
    run = partial(run_block, folder=folder, page="templates", programs=folder / "bin")
    steps = "run.sh --devices 1 --train.lr_warmup_steps 1 --train.save_interval 1 --train.max_steps"
    assert "data/slimpajama/val is complete" in run(prepare)
    assert (folder / "data" / "starcoder" / "index.json").is_file()
    for command, start in {pretrain: "random weights", continue_pretraining: "weights of"}.items():
        assert start in run(command.replace("run.sh", f"{steps} 2"))
        assert "Resuming training from" in run(command.replace("run.sh", f"{steps} 3"))
    server.kill()
    for name in ("tinyllama", "tinyllama-continued"):
        assert {path.name for path in (folder / "out" / name).glob("step-*")} >= {"step-00000002", "step-00000003"}
