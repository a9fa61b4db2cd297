"""`litgpt evaluate`: scores of lm-eval equal to those of its own `hf` model, and the perplexity of a text."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt.api import LLM
from litgpt.cli import main
from litgpt.data.tokenizer import train_tokenizer
from litgpt.infer.evaluation_page import list_scores
from litgpt.infer.perplexity import iter_windows
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.init import initialize
from litgpt.recipe.commands import COMMANDS
from litgpt.recipe.evaluate import Evaluate
from litgpt.store.save_model import save_model_folder

WORDS = "the fox jumps over a lazy dog and the dog does not mind it because dogs are kind to foxes".split()  # noqa: SIM905
SHAPE = {"n_layer": 2, "n_embd": 32, "n_head": 4, "intermediate_size": 48, "block_size": 64, "padded_vocab_size": 400}
TEMPLATE = (
    "{% for message in messages %}<|bos|>{{ message.role }}: {{ message.content }}<|eos|>{% endfor %}"
    "{% if add_generation_prompt %}<|bos|>assistant: {% endif %}"
)
TASKS = {
    "choices": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: gold
num_fewshot: 2
fewshot_split: test
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
""",
    "answers": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: [" the"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


def make_words(seed: int, words: int) -> str:
    return " ".join(WORDS[(seed * 7 + place * place) % len(WORDS)] for place in range(words))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a chat template, whose weights are large enough that its texts differ."""
    root = tmp_path_factory.mktemp("evaluate")
    tokenizer = root / "tokenizer"
    train_tokenizer([make_words(seed, 60) for seed in range(20)], "bpe", 380, tokenizer)
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text()) | {"chat_template": TEMPLATE}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
    model = GPT(Config.from_name("Llama-3.2-1B", **SHAPE, n_query_groups=2, rope_adjustments=None))
    initialize(model, 1)
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    save_model_folder(root / "model", config=model.config, tensors=model.named_parameters(), tokenizer_dir=tokenizer)
    return root / "model"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three tasks, and their rows as JSON lines."""
    root = tmp_path_factory.mktemp("tasks")
    rows: list[dict[str, Any]] = []
    for seed in range(12):
        choices = [" " + make_words(seed + number, 1 + (seed + number) % 3) for number in range(4)]
        rows.append(
            {"question": make_words(seed, 5), "choices": choices, "gold": seed % 4, "text": make_words(seed, 90)}
        )
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {root}/rows.jsonl}}}}\n"
        (root / f"{name}.yaml").write_text(f"{head}test_split: test{text}")
    return root


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def read_samples(rows: list[dict[str, Any]]) -> list[list[Any]]:
    """What a model answered for each sample, with numbers as numbers."""
    return [json.loads(json.dumps(row["filtered_resps"])) for row in sorted(rows, key=lambda row: row["doc_id"])]


def evaluate(*flags: str | Path) -> int:
    return main(["evaluate", *map(str, flags)])


@pytest.mark.slow
@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_every_sample_is_that_of_transformers(
    folder: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], *, chat: bool
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), 1234)
    reference = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "dtype": "float32"},
        tasks=list(TASKS),
        device="cpu",
        batch_size=4,
        apply_chat_template=chat,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        **seeds,
    )
    cache = tmp_path / "answers"
    flags: list[str | Path] = [folder, "--tasks", ",".join(TASKS), "--include_path", tasks, "--use_cache", cache]
    flags += ["--chat_template", str(chat).lower(), "--device", "cpu"]
    assert evaluate(*flags, "--out_dir", tmp_path / "out") == 0
    output = capsys.readouterr().out
    assert all(name in output for name in (*TASKS, "acc ↑", "report.html"))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    for task, expected in reference["samples"].items():
        ours = read_samples([line for line in lines if line["task"] == task])
        assert len(ours) == 12
        for answer, wanted in zip(ours, read_samples(expected), strict=True):
            if task == "answers":
                assert answer == wanted
            else:
                for own, other in zip(answer, wanted, strict=True):
                    assert own == (
                        pytest.approx(other, abs=1e-3)
                        if task == "rolling"
                        else [pytest.approx(other[0], abs=1e-3), other[1]]
                    )
    for task, values in reference["results"].items():
        for key in ("acc,none", "exact_match,none", "bits_per_byte,none"):
            assert results["results"][task].get(key) == (
                pytest.approx(values[key], abs=1e-5) if key in values else None
            )
    page = (tmp_path / "out" / "report.html").read_text()
    assert "choices: first samples" in page and "http" not in page.replace("http-equiv", "")
    assert cache.with_name("answers_rank0.db").is_file()
    with pytest.MonkeyPatch.context() as patch:  # the second time nothing is computed
        patch.setattr("litgpt.infer.harness.compute_likelihoods", None)
        patch.setattr("litgpt.infer.harness.generate_texts", None)
        assert evaluate(*flags, "--batch_size", "3", "--out_dir", tmp_path / "again") == 0
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    assert again["results"] == results["results"]


@pytest.mark.slow
def test_the_command_line_of_lm_eval_has_the_model(folder: Path, tasks: Path, tmp_path: Path) -> None:
    line = ["run", "--model", "litgpt", "--model_args", f"pretrained={folder},dtype=float32", "--tasks", "choices"]
    line += ["--include_path", str(tasks), "--limit", "4", "--output_path", str(tmp_path), "--batch_size", "2"]
    subprocess.run([sys.executable, "-m", "litgpt.infer.harness", *line], check=True)
    (file,) = tmp_path.rglob("results_*.json")
    written = json.loads(file.read_text())
    assert evaluate(folder, "--tasks", "choices", "--include_path", tasks, "--limit", "4", "--out_dir", tmp_path) == 0
    ours = json.loads((tmp_path / "results.json").read_text())
    assert written["results"]["choices"]["acc,none"] == ours["results"]["choices"]["acc,none"]


def test_the_perplexity_of_a_text(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = make_words(3, 120) + " é"
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    assert evaluate(folder, "--text", tmp_path / "text.txt", "--window", "32", "--stride", "8", "--device", "cpu") == 0
    scores = json.loads((folder / "evaluate" / "results.json").read_text())["text"]
    llm = LLM.load(folder, distribute=None)
    bos, ids = llm.tokenizer.bos_id, llm.tokenizer.encode(text, bos=False).tolist()
    assert bos is not None
    nats = 0.0
    for window in iter_windows(ids, bos, size=32, stride=8):
        whole = torch.tensor([window.context + window.tokens])
        logprobs = llm.model(whole[:, :-1])[0].detach().log_softmax(-1).gather(1, whole[0, 1:, None])
        nats -= float(logprobs[-len(window.tokens) :].sum())
    assert scores["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-4)
    assert scores["token_perplexity"] == pytest.approx(math.exp(nats / len(ids)), rel=1e-4)
    assert (scores["tokens"], scores["byte_count"]) == (len(ids), len(text) + 1)
    assert "bits_per_byte ↓" in capsys.readouterr().out
    assert "token_perplexity" in (folder / "evaluate" / "report.html").read_text()


def test_prompts_with_answers(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llm = LLM.load(folder, distribute=None)
    settings = {"max_new_tokens": 9, "temperature": 0}
    first, second = (llm.generate(make_words(seed, 4), **settings) for seed in (1, 2))
    rows: list[dict[str, Any]] = [
        {"prompt": make_words(1, 4), "answer": f" {first}\n"},
        {"messages": [{"role": "user", "content": make_words(2, 4)}], "answer": ["no", second]},
        {"prompt": make_words(3, 4), "answer": "neither"},
        {"prompt": make_words(1, 4), "answer": f"{first} and more"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluate(folder, "--prompts", path, "--max_new_tokens", "9", "--out_dir", tmp_path) == 0
    scores = json.loads((tmp_path / "results.json").read_text())["prompts"]
    assert (scores["count"], scores["exact_match"]) == (4, 0.5)
    assert scores["exact_match_stderr"] == pytest.approx(math.sqrt(0.25 / 3))
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line["exact_match"] for line in lines] == [1, 1, 0, 0] and lines[0]["filtered_resps"] == [first]
    assert "exact_match ↑" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert "rows.jsonl: first samples" in page and "neither" in page and make_words(2, 4) in page


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, "rows.jsonl:1: answer: not a text or a list of texts"),
        ({"prompt": "a", "answer": [1]}, "rows.jsonl:1: answer: not a text or a list of texts"),
        ({"prompt": "a", "answer": []}, "rows.jsonl:1: answer: not a text or a list of texts"),
        ({"answer": "a"}, "rows.jsonl:1: has not exactly one of prompt and messages"),
        (None, "rows.jsonl has no prompts"),
    ],
)
def test_prompts_without_answers(
    folder: Path, tmp_path: Path, row: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text("" if row is None else json.dumps(row) + "\n")
    assert evaluate(folder, "--prompts", tmp_path / "rows.jsonl") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_scores_of_groups_and_of_metrics_without_an_error() -> None:
    results = {
        "results": {"mmlu": {"alias": " - mmlu", "acc,none": 0.5, "acc_stderr,none": 0.1, "name": "mmlu"}},
        "groups": {"all": {"alias": "all", "f1,strict": 1, "f1_stderr,strict": "N/A"}},
        "higher_is_better": {"mmlu": {"acc": True}},
        "n-shot": {"mmlu": 5},
    }
    first, second = list_scores(results)
    assert first.texts == ("mmlu", "5", "acc ↑", "0.5000", "± 0.1000")
    assert second.texts == ("all", "", "f1 (strict)", "1.0000", "")


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--stride", "4"), 2, "stride: 4 has no effect with text: null; set text"),
        (("--limit", "4"), 2, "limit: 4.0 has no effect with tasks: null; set tasks"),
        (("--limit", "-4", "--tasks", "a"), 2, "limit"),
        (("--text", "none.txt"), 1, "none.txt: cannot be read"),
        (("--prompts", "none.jsonl"), 1, "none.jsonl"),
        (("--prompts", "none.txt"), 1, "prompts: none.txt is not a .jsonl"),
        (("--max_new_tokens", "4"), 2, "max_new_tokens: 4 has no effect with prompts: null; set prompts"),
        (("--text", "{folder}/config.json", "--device", "cuda:99"), 1, "device: cuda:99 is not available"),
        (
            ("--text", "{folder}/config.json", "--window", "65"),
            1,
            "window: 65 exceeds the model's context; set at most 64",
        ),
    ],
)
def test_it_refuses_in_one_line(
    folder: Path, flags: tuple[str, ...], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(folder, *(flag.format(folder=folder) for flag in flags)) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--tasks", "no_task"), "tasks: no_task is not a task of lm-eval"),
        (("--include_path", "none", "--tasks", "choices"), "include_path: none is not a folder"),
        (("--tasks", "choices", "--batch_size", "many"), "batch_size: many is not a number of texts"),
    ],
)
def test_it_refuses_tasks_in_one_line(
    folder: Path, tasks: Path, flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(folder, "--include_path", tasks, *flags) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("litgpt: error")]
    assert len(lines) == 1 and message in lines[0]


def test_it_has_the_keys_of_litgpt(litgpt: Callable[..., Any]) -> None:
    keys = {"tasks": "a,b", "force_conversion": "true", "num_fewshot": "1", "batch_size": "4", "device": "cpu"}
    keys |= {"dtype": "bfloat16", "limit": "0.5", "seed": "3", "save_filepath": "r.json", "out_dir": "o"}
    flags = [word for key, value in keys.items() for word in (f"--{key}", value)]
    recipe = litgpt("evaluate", "m", *flags, "--access_token", "x").recipe
    assert isinstance(recipe, Evaluate)
    assert (recipe.task_names, recipe.limit, recipe.batch_size, recipe.seed) == (["a", "b"], 0.5, 4, 3)
    assert litgpt("evaluate", "m", "--tasks", '["a", "b"]').recipe.task_names == ["a", "b"]
    assert COMMANDS["evaluate"].positionals == ("checkpoint_dir",)
