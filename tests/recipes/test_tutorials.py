"""The commands of every tutorial run, in order, as a reader would type them.

Blocks fenced as bash run in a temporary folder that holds a base model under the name in the pages, and the text,
tokenizer and recipe that the first blocks of `pretrain.md` make. Of other blocks (downloads, clusters, larger models)
the command lines are parsed. The models are smaller than in the pages, except in the slow test, which runs what a page
states the minutes of.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import zstandard

from tests.processes import serve_program

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "tutorials").glob("*.md"))
GENERATED = "support_matrix"  # a page of tables, without commands
LONG = ("plan", "any_to_any", "multimodal", "pretrain_tinyllama", "adding_models", "launch", "resume")
"""Pages of slow commands."""
SHAPE = {"n_layer": 2, "n_embd": 32, "n_head": 4, "head_size": 8, "intermediate_size": 48, "block_size": 512}
SHAPE |= {"padded_vocab_size": 1024}
SHRINK = [f"--model_config.{key}={value}" for key, value in SHAPE.items()] + [
    *("--train.max_seq_length=32", "--train.global_batch_size=2", "--train.micro_batch_size=2"),
    *("--precision=32-true", "--eval.max_iters=1"),
]
PROGRAM = re.compile(r"(.*/)?litgpt(:cuda)?")
"""What starts litgpt: the program, a module, or an image of a container."""
WORDS = "the first letter of a book is where its reader begins and whoever comes later finds less of it there"


def make_document(seed: int) -> str:
    """A document of 400 words."""
    words = WORDS.split()
    return " ".join(words[(seed + place * place) % len(words)] for place in range(400))


def read_blocks(page: Path) -> list[str]:
    """The blocks of a page fenced as bash."""
    return re.findall(r"^```bash\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def read_minutes(page: Path) -> int | None:
    """The minutes that a page states for its commands; None if it states none."""
    match = re.search(r"about\s+(\d+)\s+minutes\s+on\s+two\s+CPU\s+cores", page.read_text(encoding="utf-8"))
    return int(match[1]) if match else None


def write_model(folder: Path, shape: dict[str, int]) -> None:
    """Write a base model of the folder's name with its tokenizer, which is also written into the folder beside it."""
    from litgpt.data.tokenizer import train_tokenizer
    from litgpt.model.config import Config
    from litgpt.model.gpt import GPT
    from litgpt.model.init import initialize
    from litgpt.store.save_model import save_model_folder

    train_tokenizer((make_document(seed) for seed in range(3)), "bpe", 512, folder.parent / "tokenizer")
    model = GPT(Config.from_name(folder.name, **shape))
    initialize(model, 1)
    save_model_folder(
        folder, config=model.config, tensors=model.named_parameters(), tokenizer_dir=folder.parent / "tokenizer"
    )


def run_block(block: str, folder: Path, *, page: str, programs: Path) -> str:
    """What a block of a page prints, in a folder and with the programs of `write_programs`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if page == "launch":
        environment["STARTER"] = str(Path(sys.executable).with_name("litgpt"))  # the program that starts ranks itself
    environment["PATH"] = os.pathsep.join((str(programs), str(Path(sys.executable).parent), os.environ["PATH"]))
    run = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert run.returncode == 0, f"{block}\n{run.stdout[-3000:]}"
    return run.stdout


def write_programs(folder: Path, *, shrunk: bool) -> BaseProcess:
    """Write `litgpt`, which trains small models or any, and `python`; both fork the server process that is returned."""
    folder.mkdir()
    (folder / "litgpt").write_text(
        f"""#!/bin/sh
program={folder}/fork
case "$*" in *--devices*) program="${{STARTER:-$program}}" ;; pretrain*) set -- "$@" --devices=1 ;; esac
[ "$1" = pretrain ] && set -- "$@" {" ".join(SHRINK if shrunk else [])}
exec "$program" "$@"
"""
    )
    (folder / "litgpt").chmod(0o755)
    server = serve_program(folder / "fork")
    (folder / "python").symlink_to("fork")
    return server


def write_inputs(folder: Path, *, shape: dict[str, int]) -> None:
    """Write the models and the text that pages assume."""
    models = folder / "checkpoints"
    write_model(models / "EleutherAI" / "pythia-14m", shape)
    shutil.copytree(models / "EleutherAI" / "tokenizer", models / "meta-llama" / "Llama-2-7b-hf")
    for split in ("train", "validation"):
        (folder / "slimpajama-raw" / split).mkdir(parents=True)
        with zstandard.open(folder / "slimpajama-raw" / split / "0.jsonl.zst", "wt") as file:
            file.writelines(json.dumps({"text": make_document(seed)}) + "\n" for seed in range(20))
    (folder / "config_hub").symlink_to(ROOT / "config_hub")


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a `litgpt` that trains small models."""
    folder = tmp_path_factory.mktemp("programs") / "bin"
    server = write_programs(folder, shrunk=True)
    yield folder
    server.kill()


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the pages assume, with a small model."""
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder, shape=SHAPE)
    return folder


@pytest.fixture(scope="session")
def books(tmp_path_factory: pytest.TempPathFactory, programs: Path) -> Path:
    """The text, tokenizer and recipe that the first blocks of `pretrain.md` make."""
    folder = tmp_path_factory.mktemp("books")
    for block in read_blocks(ROOT / "tutorials" / "pretrain.md")[:2]:
        run_block(block, folder, page="pretrain", programs=programs)
    return folder


@pytest.fixture
def prepared(page: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A working folder with the text of a page: `books`, or that of `PythonDocs`."""
    text = page.read_text(encoding="utf-8")
    if page.stem != "pretrain" and "books.yaml" in text:
        shutil.copytree(request.getfixturevalue("books"), tmp_path, dirs_exist_ok=True)
    if "data: PythonDocs" in text:
        shutil.copytree(request.getfixturevalue("python_docs"), tmp_path / "data" / "python-docs")


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.stem, marks=[pytest.mark.slow] * (page.stem in LONG))
        for page in PAGES
        if page.stem != GENERATED
    ],
)
@pytest.mark.usefixtures("prepared")
def test_commands_of_the_page_run(page: Path, tmp_path: Path, inputs: Path, programs: Path) -> None:
    shutil.copytree(inputs, tmp_path, symlinks=True, dirs_exist_ok=True)
    blocks = read_blocks(page)
    assert blocks
    for block in blocks:
        run_block(block, tmp_path, page=page.stem, programs=programs)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", [page for page in PAGES if read_minutes(page)], ids=lambda page: page.stem)
@pytest.mark.usefixtures("prepared")
def test_the_page_runs_as_it_stands_within_its_minutes(page: Path, tmp_path: Path) -> None:
    write_inputs(tmp_path, shape={})
    server = write_programs(tmp_path / "bin", shrunk=False)
    started = time.monotonic()
    for block in read_blocks(page):
        run_block(block, tmp_path, page=page.stem, programs=tmp_path / "bin")
    server.kill()
    assert time.monotonic() - started <= 60 * (read_minutes(page) or 0)


def test_no_two_pages_write_one_folder() -> None:
    pages = defaultdict(set)
    for page in PAGES:
        for block in read_blocks(page):
            for folder in re.findall(r"\bout/[\w.-]+", block):
                pages[folder].add(page.stem)
    assert len(pages) > 20
    assert {folder: names for folder, names in pages.items() if len(names) > 1} == {}


def read_command_lines(page: Path) -> Iterator[list[str]]:
    """The command lines of litgpt in the blocks of a page that do not run, without the program that starts them."""
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"^```(?:sh|console)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            program = next((place for place, word in enumerate(words) if PROGRAM.fullmatch(word)), None)
            if program is not None and not words[max(program - 1, 0)].startswith(
                ("-t", "--")
            ):  # it is no option's value
                yield words[program + 1 :]


WITH_COMMANDS = [*PAGES, ROOT / "README.md", ROOT / "tutorials" / "templates" / "README.md"]
LINKED = [*WITH_COMMANDS, ROOT / "CONTRIBUTING.md"]


@pytest.mark.slow
def test_command_lines_that_do_not_run_here_are_valid(
    litgpt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, books: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config_hub").symlink_to(ROOT / "config_hub")
    for name in ("books.yaml", "recipe.yaml"):
        shutil.copy(books / "books.yaml", name)
    for name in ("fox.png", "street.mp4"):
        Path(name).touch()  # looked for, but not read before the model is
    lines = [(page.name, words) for page in WITH_COMMANDS for words in read_command_lines(page)]
    assert len(lines) > 40
    assert [(page, words, outcome.err) for page, words in lines if (outcome := litgpt(*words)).code] == []


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_the_page_exist(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
