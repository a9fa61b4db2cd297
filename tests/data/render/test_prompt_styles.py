"""Prompt styles: every text is LitGPT's to the byte, every model has its style, folders name theirs safely."""

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import litgpt.prompts
from litgpt.data.render.prompt_styles import load_prompt_style, save_prompt_style
from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.prompts import ChatML, PromptStyle
from tests.data.templates import write_tokenizer

# SHA-256 of what LitGPT 0.5.13 writes: plain, with a system text, with an input, with both; parted by |
WRITTEN = {
    "alpaca": "043103067f11",
    "flan": "88a2f4162b6a",
    "longform": "4b2401ce8673",
    "stablelm-alpha": "6b6b3c3f1e47",
    "stablelm-zephyr": "03eeb57b5312",
    "falcon": "04357865aa43",
    "llama2-function-calling": "fc01b045a7d0",
    "llama2": "6818494c1ae8",
    "freewilly2": "ca25a7a742c0",
    "platypus": "4088854652fc",
    "stablecode": "6d2a76fb174f",
    "codellama": "7852cf619d90",
    "phi-1": "55abb91ba70a",
    "phi-2": "9af7f46ddf41",
    "phi-3": "1dab9e7b03fc",
    "phi-4": "d3a3b5618ea1",
    "phi-4-reasoning": "6f5daa20b233",
    "phi-4-mini": "7fc707526b53",
    "phi-4-mini-reasoning": "fcc8930d93f0",
    "tinyllama": "573d3580fd9c",
    "gemma": "f39fee352d3e",
    "llama3": "fbc3ab543073",
    "olmo": "2ff003780d9b",
    "qwen2.5": "7622082f2c5b",
    "qwen2.5-math": "3d8792517f58",
    "qwq": "9d0e81f74059",
    "qwen3": "92035ea4c3db",
    "smollm2": "917cac6cbaca",
    "salamandra": "f23448faa00b",
    "default": "0461b504a1c7",
    "falcon3": "03eeb57b5312",
    "r1": "221c3984dc81",
}

STYLE_OF = {
    "stablelm-base-alpha-3b": "Default",
    "stablelm-tuned-alpha-7b": "StableLMAlpha",
    "stablelm-zephyr-3b": "StableLMZephyr",
    "stablecode-instruct-alpha-3b": "StableCode",
    "falcon-7b-instruct": "Falcon",
    "Falcon3-1B-Instruct": "Falcon3",
    "Llama-2-7b-chat-hf": "Llama2",
    "Llama-2-7b-chat-hf-function-calling-v2": "Llama2FunctionCalling",
    "Llama-3.2-1B-Instruct": "Llama3",
    "CodeLlama-34b-Instruct-hf": "CodeLlama",
    "OLMo-1B-hf": "OLMo",
    "OLMo-2-1124-7B-SFT": "Llama3",
    "R1-Distill-Llama-8B": "R1Base",
    "FreeWilly2": "FreeWilly2",
    "Platypus2-70B-instruct": "Platypus",
    "Mixtral-8x7B-Instruct-v0.1": "CodeLlama",
    "phi-1_5": "Phi1",
    "phi-2": "Phi2",
    "Phi-3.5-mini-instruct": "Phi3",
    "phi-4": "Phi4",
    "Phi-4-reasoning-plus": "Phi4Reasoning",
    "Phi-4-mini-instruct": "Phi4Mini",
    "Phi-4-mini-reasoning": "Phi4MiniReasoning",
    "tiny-llama-1.1b-chat": "TinyLlama",
    "CodeGemma-7b-it": "Gemma",
    "Gemma-2b": "Default",
    "Qwen2.5-0.5B": "Qwen2_5",
    "Qwen2.5-Math-1.5B": "Qwen2_5_Math",
    "QwQ-32B": "QwQ",
    "Qwen3-0.6B": "Qwen3",
    "SmolLM2-135M-Instruct": "SmolLM2",
    "SmolLM2-135M": "Default",
    "salamandra-2b-instruct": "Salamandra",
}


@pytest.mark.parametrize("name", WRITTEN)
def test_texts_are_the_published_ones(name: str) -> None:
    style = PromptStyle.from_name(name)
    texts: list[dict[str, Any]] = [{}, {"sys_prompt": "<<S>>"}, {"input": "<<I>>"}]
    texts.append({"sys_prompt": "<<S>>", "input": "<<I>>"})
    written = "|".join(style.apply("<<P>>", **rest) for rest in texts)
    assert hashlib.sha256(written.encode()).hexdigest()[:12] == WRITTEN[name]
    assert style.apply("x", sys_prompt="", input="") == style.apply("x")
    odd = "{system}{prompt}{input}"
    assert style.apply(odd) == style.apply("<<P>>").replace("<<P>>", odd)  # a prompt is text, not a format


def test_alpaca_in_full() -> None:
    assert PromptStyle.from_name("alpaca").apply("X", input="I") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nX\n\n### Input:\nI\n\n### Response:\n"
    )


@pytest.mark.parametrize("model", STYLE_OF)
def test_every_model_has_its_style(model: str) -> None:
    config: Any = SimpleNamespace(name=model)
    assert type(PromptStyle.from_config(config)).__name__ == STYLE_OF[model]


def test_lists_of_messages() -> None:
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    style = PromptStyle.from_name("llama3")
    written = style.apply([{"role": "user", "content": " a "}, {"role": "assistant", "content": "b"}], sys_prompt="S")
    assert written == (
        f"<|begin_of_text|>{head.format('system')}S<|eot_id|>{head.format('user')}a<|eot_id|>"
        f"{head.format('assistant')}b<|eot_id|>{head.format('assistant')}"
    )
    with pytest.raises(UserError, match="use llama3"):
        PromptStyle.from_name("alpaca").apply([{"role": "user", "content": "a"}])
    with pytest.raises(UserError, match="message 2 has role 'system'"):
        style.apply([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}])


def test_classes_and_names_of_litgpt() -> None:
    assert litgpt.prompts.Alpaca().apply("x") == PromptStyle.from_name("alpaca").apply("x")
    assert type(litgpt.prompts.prompt_styles["qwen2.5"]()).__name__ == "Qwen2_5"
    assert ChatML("m").apply("x") == "<|im_start|>system\nm<|im_end|>\n" + ChatML().apply("x")
    with pytest.raises(AttributeError, match="Alpacca"):
        litgpt.prompts.__getattr__("Alpacca")
    with pytest.raises(UserError, match="did you mean alpaca"):
        PromptStyle.from_name("alpacca")


def test_stop_tokens(tmp_path: Path) -> None:
    tokenizer: Tokenizer = write_tokenizer(tmp_path, "llama3")
    assert PromptStyle.from_name("alpaca").stop_tokens(tokenizer) == ([tokenizer.eos_id],)
    ends = PromptStyle.from_name("llama3").stop_tokens(tokenizer)
    assert ends == ([tokenizer.eos_id], [tokenizer.token_to_id("<|eot_id|>")])


def test_folders_name_their_style(tmp_path: Path) -> None:
    save_prompt_style("qwen3", tmp_path)
    assert (tmp_path / "prompt_style.yaml").read_text() == "class_path: litgpt.prompts.Qwen3\n"
    assert type(load_prompt_style(tmp_path)).__name__ == "Qwen3"
    for text in ("class_path: os.system", "class_path: litgpt.prompts.rows", "[]", "a: b", "\x00", "class_path: 3"):
        (tmp_path / "prompt_style.yaml").write_text(text)
        with pytest.raises(UserError, match=r"prompt_style\.yaml[: ].*(Alpaca|not valid YAML)"):
            load_prompt_style(tmp_path)


class Shout(PromptStyle):
    """A style of a user's own."""

    def apply(self, prompt: Any, **kwargs: Any) -> str:
        return f"{prompt.upper()}! {kwargs['tone']}\n"


def test_own_style() -> None:
    assert Shout().apply("hi", tone="loud") == "HI! loud\n"
