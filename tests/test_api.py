"""`LLM` and `litgpt generate`: folders of every kind, prompts, streams, limits, and what is refused."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml

from litgpt import GPT, LLM, Config
from litgpt.cli import main
from litgpt.data.render.prompt_styles import PromptStyle
from litgpt.data.tokenizer import train_tokenizer
from litgpt.errors import UserError
from litgpt.infer import load
from litgpt.store.save_model import save_model_folder
from tests import runs
from tests.data.render.test_chat_template import CHATML
from tests.processes import join_ranks, run_litgpt, start_ranks

WORDS = "the fox and the dog jump over a lazy cat while it rains on the green hill " * 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights in bfloat16, and a tokenizer whose texts begin with a token of their own."""
    root = tmp_path_factory.mktemp("models")
    train_tokenizer([WORDS], "bpe", 300, root / "tokenizer")
    config = Config(**{**runs.SHAPE, "block_size": 256, "name": "tiny"})
    torch.manual_seed(0)
    model = GPT(config).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    save_model_folder(root / "tiny", config=config, tensors=model.named_parameters(), tokenizer_dir=root / "tokenizer")
    return root / "tiny"


@pytest.fixture
def chatty(folder: Path, tmp_path: Path) -> Path:
    """The same with a chat template."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    return tmp_path


@pytest.fixture
def llm(folder: Path) -> LLM:
    return LLM.load(folder, distribute=None)


def test_on_the_cpu_in_the_type_of_the_files(llm: LLM, folder: Path) -> None:
    assert {parameter.dtype for parameter in llm.model.parameters()} == {torch.bfloat16}
    assert {parameter.device.type for parameter in llm.model.parameters()} == {"cpu"}
    ids = torch.tensor([[1, 2, 3]])
    assert llm.model(ids).shape == (1, 3, 320) and not llm.training
    assert torch.equal(llm(ids), llm.model(ids))
    assert (llm.config.name, llm.checkpoint_dir) == ("tiny", folder)


@pytest.mark.parametrize("token", [-1, 320])
def test_tokens_that_the_model_does_not_have_are_named(llm: LLM, token: int) -> None:
    ids, wrong = torch.tensor([[5, 6]]), torch.tensor([[5, token]])
    for key, arguments in {"input_ids": (wrong,), "target_ids": (ids, wrong)}.items():
        with pytest.raises(UserError, match=f"^{key}: has token {token}, but the model has 320 tokens"):
            llm(*arguments)
    with pytest.raises(UserError, match=r"^input_ids: has no tokens"):
        llm(ids[:, :0])


def test_logits_equal_transformers(folder: Path) -> None:
    import transformers

    llm = LLM.load(folder, distribute=None)
    llm.distribute(accelerator="cpu", precision="32-true")
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(llm.model(ids), reference(ids).logits, atol=1e-5, rtol=1e-5)


def test_loss_shifts_inside(llm: LLM) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    logits, loss = llm(ids, ids)
    torch.testing.assert_close(loss, F.cross_entropy(logits[0, :-1], ids[0, 1:]))
    masked = llm(ids, torch.tensor([[5, 6, -100, -100]]), lambda _scores, targets: targets)[1]
    assert masked.tolist() == [6, -100, -100]


def test_text_tokens_and_streams_are_the_same(llm: LLM) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 20, "temperature": 0.0}
    text = llm.generate("the fox", **settings)
    assert text and "".join(llm.generate("the fox", stream=True, **settings)) == text
    numbers = llm.generate("the fox", return_as_token_ids=True, **settings)
    assert numbers.dtype == torch.int64 and llm.tokenizer.decode(numbers) == text
    assert list(llm.generate("the fox", return_as_token_ids=True, stream=True, **settings)) == numbers.tolist()
    stream = llm.generate("the fox", stream=True, **settings)
    assert text.startswith(next(stream))


def test_a_seed_gives_the_same_text_again(llm: LLM) -> None:
    def write(seed: int | None) -> str:
        return llm.generate("the", max_new_tokens=20, temperature=2.0, top_k=100, top_p=0.9, seed=seed)

    state = torch.get_rng_state()
    assert write(5) == write(5) != write(6)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's own random numbers are not touched
    torch.manual_seed(3)
    first = write(None)
    torch.manual_seed(3)
    assert write(None) == first


def test_stop_strings_end_text_and_tokens(llm: LLM) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 40, "temperature": 1.0, "seed": 2}
    text = llm.generate("the fox", **settings)
    match = re.search("[a-zA-Z]{2,}", text[len(text) // 2 :])
    assert match
    stop = match[0]
    before = text[: text.index(stop)]
    tokens: list[int] = []
    assert llm.generate("the fox", stop=[stop, "never there"], on_token=tokens.append, **settings) == before
    numbers = llm.generate("the fox", stop=stop, return_as_token_ids=True, **settings).tolist()
    assert numbers == tokens and stop in llm.tokenizer.decode(numbers)
    assert stop not in llm.tokenizer.decode(numbers[:-1])
    with pytest.raises(UserError, match="stop: ''"):
        llm.generate("a", stop="")


def test_the_models_own_end_of_text(chatty: Path) -> None:
    """A model that likes token 0 best, which generation_config.json names as one of its ends."""
    llm = LLM.load(chatty, distribute=None)
    with torch.no_grad():
        llm.model.head.weight.zero_()
    assert llm.generate("the fox", temperature=0, max_new_tokens=4, return_as_token_ids=True).tolist() == [0] * 4
    (chatty / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 0]}))
    llm.tokenizer = LLM.load(chatty, distribute=None).tokenizer
    assert llm.generate("the fox", temperature=0, max_new_tokens=4, return_as_token_ids=True).tolist() == []
    assert llm.generate("the fox", temperature=0, max_new_tokens=4) == ""


def test_a_prompt_goes_through_the_chat_template(chatty: Path) -> None:
    llm = LLM.load(chatty, distribute=None)
    text = llm.tokenizer.decode(llm.prompt_tokens("the fox", "you"))
    assert text == "<|im_start|>system\nyou<|im_end|>\n<|im_start|>user\nthe fox<|im_end|>\n<|im_start|>assistant\n"
    assert llm.prompt_tokens("the fox", chat_template=False) == llm.tokenizer.encode("the fox").tolist()
    settings: dict[str, Any] = {"temperature": 0, "max_new_tokens": 8, "return_as_token_ids": True}
    with_template = llm.generate("the fox", **settings).tolist()
    assert with_template != llm.generate("the fox", chat_template=False, **settings).tolist()


def test_unsupported_prompts_are_refused(llm: LLM) -> None:
    with pytest.raises(UserError, match=r"sys_prompt: 'you' is not supported with .* without a chat template"):
        llm.generate("a", sys_prompt="you")
    with pytest.raises(UserError, match="chat_template: true, but"):
        llm.generate("a", chat_template=True)


def test_the_prompt_style_of_the_folder_overrides_its_template(chatty: Path, tmp_path: Path) -> None:
    (chatty / "prompt_style.yaml").write_text("class_path: litgpt.prompts.Alpaca\n")
    llm = LLM.load(chatty, distribute=None)
    styled = llm.tokenizer.decode(llm.prompt_tokens("the fox"))
    assert styled == PromptStyle.from_name("alpaca").apply("the fox") and "### Instruction:" in styled
    assert llm.prompt_tokens("the fox", chat_template=True) != llm.prompt_tokens("the fox")
    assert llm.tokenizer.decode(llm.prompt_tokens("the fox", chat_template=False)) == "the fox"
    llm.prompt_style = PromptStyle.from_name("stablelm-zephyr")
    with pytest.raises(UserError, match="sys_prompt: 'you' is not supported with the prompt style StableLMZephyr"):
        llm.prompt_tokens("a", "you")
    llm.save(tmp_path / "saved", prompt_style="llama3")
    again = LLM.load(tmp_path / "saved", distribute=None)
    assert "<|start_header_id|>" in again.tokenizer.decode(again.prompt_tokens("a", "you"))
    again.prompt_style = PromptStyle.from_name("default")
    again.chat = None
    assert again.prompt_tokens("the fox") == again.prompt_tokens("the fox", chat_template=False)
    assert not again.replies()


def test_a_style_of_the_user_is_rendered_by_the_chat_template_that_was_saved_with_it(
    chatty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Colon(PromptStyle):
        def apply(self, prompt: Any, **_kwargs: Any) -> str:
            return f"{prompt}:"

    LLM.load(chatty, distribute=None).save(tmp_path / "saved", prompt_style=Colon())
    again = LLM.load(tmp_path / "saved", distribute=None)
    assert again.tokenizer.decode(again.prompt_tokens("the fox")) == "the fox:"
    assert "is not a class of litgpt.prompts" in capsys.readouterr().err
    (tmp_path / "saved" / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"is not a class of litgpt\.prompts"):
        LLM.load(tmp_path / "saved", distribute=None)


def test_stops_of_several_tokens_that_a_prompt_style_has(chatty: Path) -> None:
    class Ends(PromptStyle):
        def apply(self, prompt: Any, **_kwargs: Any) -> str:
            return f"{prompt}:"

        def stop_tokens(self, tokenizer: Any) -> tuple[list[int], ...]:
            return ([], [7], tokenizer.encode("dog over", bos=False).tolist())

    llm = LLM.load(chatty, distribute=None)
    assert llm.prompt_encoder().get_stops(None) == ([1], [])
    llm.prompt_style = Ends()
    assert llm.prompt_encoder().get_stops(None) == ([1, 7], ["dog over"])
    assert llm.prompt_encoder().get_stops(False) == ([1], [])


def test_saved_it_loads_again(llm: LLM, tmp_path: Path) -> None:
    with torch.no_grad():
        llm.model.embedding.weight[3] += 1
    llm.save(tmp_path / "saved")
    again = LLM.load(tmp_path / "saved", distribute=None)
    assert again.state_dict().keys() == llm.state_dict().keys() and "embedding.weight" in llm.state_dict()
    assert all(torch.equal(value, llm.state_dict()[name]) for name, value in again.state_dict().items())
    again.load_state_dict({name: torch.zeros_like(value) for name, value in llm.state_dict().items()})
    assert not again.model.embedding.weight.any()


def test_random_weights_of_a_known_shape(folder: Path) -> None:
    torch.manual_seed(1)
    random = LLM.load(str(folder), init="random", tokenizer_dir=folder, distribute=None)
    assert random.generate("the fox", max_new_tokens=3)
    torch.manual_seed(1)
    again = LLM.load(str(folder), init="random", tokenizer_dir=folder, distribute=None)
    assert torch.equal(random.model.embedding.weight, again.model.embedding.weight)
    with pytest.raises(UserError, match="tokenizer_dir: None"):
        LLM.load("pythia-14m", init="random")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"devices": 2}, "devices: 2 .*; set 1, or use the commands litgpt generate_tp"),
        ({"generate_strategy": "sequential"}, "generate_strategy: 'sequential' .* litgpt generate_tp and"),
        ({"precision": "8-true"}, "precision: '8-true' is not known; set 64-true, 32-true"),
        ({"accelerator": "tpu"}, "accelerator: 'tpu' is not available; set auto or cpu"),
        ({"fixed_kv_cache_size": 257}, "fixed_kv_cache_size: 257"),
        ({"quantize": "bnb.nf5"}, "quantize: 'bnb.nf5' is not known; set bnb.nf4"),
        ({"quantize": "bnb.nf4", "precision": "bf16-mixed"}, "quantize: bnb.nf4 is not supported with bf16-mixed"),
    ],
)
def test_distribute_refuses(llm: LLM, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        llm.distribute(**settings)


def test_precisions(llm: LLM) -> None:
    exact = llm.model(torch.tensor([[1, 2, 3]])).float()
    for precision, stored, computed in (
        ("64-true", torch.float64, torch.float64),
        ("bf16-mixed", torch.float32, torch.bfloat16),
        ("32-true", torch.float32, torch.float32),
    ):
        llm.distribute(accelerator="cpu", precision=precision)
        logits = llm.model(torch.tensor([[1, 2, 3]]))
        assert llm.model.embedding.weight.dtype == stored and logits.dtype == computed
        torch.testing.assert_close(logits.float(), exact, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("kind", ["bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.int8"])
def test_quantized_weights_are_smaller_and_close(llm: LLM, kind: str) -> None:
    library = pytest.importorskip("bitsandbytes")
    ids = torch.tensor([[7, 8, 9, 10, 11]])
    exact = llm.model(ids).float()
    llm.distribute(accelerator="cpu", quantize=kind)
    layers = [layer for layer in llm.model.blocks.modules() if isinstance(layer, torch.nn.Linear)]
    assert layers and all(isinstance(layer, library.nn.Linear4bit | library.nn.Linear8bitLt) for layer in layers)
    assert {layer.weight.dtype for layer in layers} <= {torch.uint8, torch.int8}
    logits = llm.model(ids).float()
    assert 0 < (logits - exact).abs().mean() < 0.4 * exact.std()
    assert llm.generate("the fox", max_new_tokens=5, temperature=0) is not None


def test_missing_bitsandbytes_is_one_line(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    match = r"quantize: bnb.nf4 needs bitsandbytes, which is not installed: pip install 'litgpt\[quantize\]'"
    with pytest.raises(UserError, match=match):
        llm.distribute(quantize="bnb.nf4")


def test_folders_and_names(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints" / "org" / "tiny").mkdir(parents=True)
    assert load.find_folder("org/tiny") == load.CHECKPOINTS / "org/tiny"
    assert load.find_folder(folder / "config.json") == folder
    asked = []
    monkeypatch.setattr(
        load.hub, "download", lambda name, root, access_token: asked.append((name, access_token)) or root
    )
    assert load.find_folder("org/other", access_token="secret") == load.CHECKPOINTS
    load.find_folder("pythia-14m")
    assert asked == [("org/other", "secret"), ("EleutherAI/pythia-14m", None)]
    for name in ("nothing", "a/b/c", "checkpoints/a", str(tmp_path / "gone"), "../up/x"):
        with pytest.raises(UserError, match=r"^checkpoint_dir: .* is not a folder; set"):
            load.find_folder(name)
    assert len(asked) == 2


def test_a_name_without_network_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def offline(*_arguments: Any, **_settings: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", offline)
    with pytest.raises(UserError, match="checkpoint_dir: org/other is not a folder, and org/other: the hub"):
        LLM.load("org/other")


def test_runs_steps_and_litgpt_folders(tmp_path: Path) -> None:
    """A run's folder means its newest step; its finished model is a folder of its own."""
    runs.write_text(tmp_path)
    recipe = runs.write_recipe(tmp_path, train__max_steps=4)
    assert join_ranks(start_ranks(run_litgpt, "pretrain", "--config", str(recipe), folder=tmp_path)) == [0]
    out = tmp_path / "out"
    final, run, step, earlier = (
        LLM.load(out / name, distribute=None) for name in ("final", "", "step-00000004", "step-00000002")
    )
    assert torch.equal(final.model.embedding.weight, run.model.embedding.weight)
    assert torch.equal(step.model.embedding.weight, run.model.embedding.weight)
    assert not torch.equal(earlier.model.embedding.weight, run.model.embedding.weight)
    assert run.checkpoint_dir == out / "step-00000004"
    assert run.generate("word", max_new_tokens=4, temperature=0) == final.generate(
        "word", max_new_tokens=4, temperature=0
    )


Run = Callable[..., Any]


@pytest.fixture
def generate(folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*flags: str, where: Path = folder, code: int = 0) -> tuple[str, str]:
        assert main(["generate", str(where), "--max_new_tokens", "12", *flags]) == code
        return tuple(capsys.readouterr())  # type: ignore[return-value]

    return run


def test_command_prints_the_text_to_stdout_and_times_to_stderr(generate: Run, llm: LLM) -> None:
    out, err = generate("--prompt", "the fox", "--temperature", "0")
    assert out == "the fox" + llm.generate("the fox", max_new_tokens=12, temperature=0) + "\n"
    assert "Time to load the model" in err and "Time for inference 1: " in err and "tokens/sec" in err


def test_command_repeats_itself_for_a_seed(generate: Run) -> None:
    """The seed is 1234 where none is given; samples differ from each other."""
    flags = ("--prompt", "the", "--num_samples", "2", "--temperature", "3", "--top_k", "null", "--top_p", "0.95")
    first = generate(*flags)[0]
    assert generate(*flags, "--seed", "1234", "--stream", "false")[0] == first
    assert generate(*flags, "--seed", "5")[0] != first
    sample, next_sample = first.split("\nthe")
    assert sample != "the" + next_sample.removesuffix("\n")


def test_command_stops_at_a_text(generate: Run) -> None:
    whole = generate("--prompt", "the fox", "--temperature", "0")[0].removesuffix("\n")
    stop = whole[-3:]
    before = whole[: whole.index(stop, len("the fox"))] + "\n"
    assert generate("--prompt", "the fox", "--temperature", "0", "--stop", stop)[0] == before
    listed = json.dumps(["never there", stop])
    assert generate("--prompt", "the fox", "--temperature", "0", "--stop", listed)[0] == before


def test_command_prints_a_reply_alone(generate: Run, chatty: Path) -> None:
    llm = LLM.load(chatty, distribute=None)
    reply = llm.generate("the fox", "you", max_new_tokens=12, temperature=0)
    asked = ("--prompt", "the fox", "--temperature", "0")
    assert generate(*asked, "--sys_prompt", "you", where=chatty)[0] == reply + "\n"
    assert generate(*asked, "--chat_template", "false", where=chatty)[0].startswith("the fox")


def test_command_writes_the_texts_of_a_file_in_its_order(generate: Run, llm: LLM, tmp_path: Path) -> None:
    """Each is that of its prompt alone, whatever its length and that of others."""
    prompts = ["the fox", "a", "the lazy dog jumps over the quick brown fox"] * 12  # more than run at a time
    (tmp_path / "prompts.txt").write_text("\n\n".join(prompts))
    output = tmp_path / "new" / "texts.jsonl"
    given = ("--prompts", str(tmp_path / "prompts.txt"), "--output", str(output), "--temperature", "0")
    out, err = generate(*given, "--logprobs", "2")
    assert out == "" and "Time for 36 texts" in err
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(36)) and [row["prompt"] for row in rows] == prompts
    for row in rows[:3]:
        assert row["text"] == llm.generate(row["prompt"], max_new_tokens=12, temperature=0)
        assert row["finish_reason"] in ("stop", "length")
        for token in row["logprobs"]:  # greedy: the token is the most likely one
            assert len(token["top"]) == 2 and token["logprob"] == token["top"][0]["logprob"] <= 0
    assert not list(output.parent.glob("*.partial"))
    stop = rows[0]["text"][-3:]
    generate(*given, "--stop", stop)
    first = json.loads(output.read_text().splitlines()[0])
    assert first["text"] == rows[0]["text"][: rows[0]["text"].index(stop)] and first["finish_reason"] == "stop"


def test_command_answers_chats_of_a_file(generate: Run, chatty: Path, tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "you"}, {"role": "user", "content": "the fox"}]
    lines = [{"messages": messages}, {"prompt": "the fox"}]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out, _ = generate("--prompts", str(tmp_path / "chats.jsonl"), "--temperature", "0", where=chatty)
    llm = LLM.load(chatty, distribute=None)
    expected = [llm.generate("the fox", sys_prompt, max_new_tokens=12, temperature=0) for sys_prompt in ("you", None)]
    assert [json.loads(line)["text"] for line in out.splitlines()] == expected
    for flag, value in (("--sys_prompt", "you"), ("--chat_template", "false")):
        out, err = generate("--prompts", str(tmp_path / "chats.jsonl"), flag, value, where=chatty, code=1)
        assert out == "" and f"chats.jsonl:1: {flag[2:]}: " in err and "has no effect on messages" in err


def test_command_follows_a_schema_and_an_expression(generate: Run, tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["red", "green"]}')
    asked = ("--prompt", "the fox", "--temperature", "3")
    assert generate(*asked, "--json_schema", str(schema))[0].removeprefix("the fox").strip() in ('"red"', '"green"')
    assert re.fullmatch("the fox[xyz]{3}\n", generate(*asked, "--regex", "[xyz]{3}")[0])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "prompts.jsonl:2: not JSON"),
        ('{"text": "a"}', "prompts.jsonl:2: has not exactly one of prompt and messages"),
        ('{"prompt": 3}', "prompts.jsonl:2: prompt: 3 is not valid"),
        ('{"messages": []}', "prompts.jsonl:2: messages: [] is not valid"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "prompts.jsonl:2: messages: "),
        (json.dumps({"prompt": "the fox " * 400}), "prompts.jsonl:2: prompt: "),
    ],
)
def test_command_names_the_line_that_has_no_prompt(generate: Run, tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "a"}}\n{line}\n')
    out, err = generate("--prompts", str(path), code=1)
    assert out == "" and message in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--logprobs", "1"), 2, "logprobs: 1 has no effect with a single prompt; set prompts: FILE"),
        (("--prompts", "none.txt"), 2, "prompts: none.txt is not a file"),
        (("--presence_penalty", "3"), 2, "presence_penalty"),
        (("--json_schema", "none.json"), 1, "json_schema: none.json is neither a JSON object nor a file"),
        (("--json_schema", "{}", "--regex", "a"), 2, "regex: a text follows either json_schema or regex"),
        (("--top_k", "0"), 2, "top_k: 0 is not valid"),
        (("--top_p", "1.5"), 2, "top_p"),
        (("--temperature", "-1"), 2, "temperature"),
        (("--quantize", "gptq"), 2, "quantize: 'gptq' is not valid; use bnb.nf4"),
        (("--precision", "transformer-engine"), 2, "precision"),
        (("--max_new_tokens", "500"), 1, "max_new_tokens: 500 after a prompt of"),
        (("--sys_prompt", "x"), 1, "sys_prompt: 'x' is not supported"),
    ],
)
def test_command_refuses_in_one_line(generate: Run, flags: tuple[str, ...], code: int, message: str) -> None:
    out, err = generate(*flags, code=code)
    lines = [line for line in err.splitlines() if not line.startswith("Time")]
    assert out == "" and len(lines) == 1 and lines[0].startswith("litgpt: error: ") and message in lines[0]


def test_command_refuses_a_folder_without_a_model(generate: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    out, err = generate(where=tmp_path / "empty", code=1)
    assert out == "" and len(err.splitlines()) == 1 and "empty" in err


def test_command_takes_the_keys_of_litgpt(tmp_path: Path, litgpt: Run) -> None:
    recipe = {"checkpoint_dir": "m", "prompt": "What food do llamas eat?", "sys_prompt": None, "num_samples": 1}
    recipe |= {"max_new_tokens": 50, "top_k": 50, "top_p": 1.0, "temperature": 0.8, "quantize": None, "precision": None}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe | {"compile": False}))
    given = litgpt("generate", "--config", tmp_path / "r.yaml").recipe
    assert given == litgpt("generate", "m").recipe
    assert (given.seed, given.stop, given.stream, given.chat_template) == (1234, None, True, None)


def test_importing_litgpt_loads_no_torch() -> None:
    code = "import sys, litgpt; assert 'torch' not in sys.modules; litgpt.cli if hasattr(litgpt, 'cli') else 0"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.getcwd()})


@pytest.mark.parametrize(("prompt", "sys_prompt", "key"), [("a\ud800", None, "prompt"), ("a", "a\ud800", "sys_prompt")])
def test_a_prompt_that_is_not_utf8_is_named(chatty: Path, prompt: str, sys_prompt: str | None, key: str) -> None:
    llm = LLM.load(chatty, distribute=None)
    with pytest.raises(UserError, match=rf"^{key}: 'a\\ud800' is not UTF-8 at character 2"):
        llm.generate(prompt, sys_prompt)
    with pytest.raises(UserError, match=r"text: .* is not UTF-8"):
        llm.tokenizer.encode("a\ud800")
