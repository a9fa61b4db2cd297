"""The files of a prompt format: transformers renders from them what a run was trained with, and ends where it ends."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig, PreTrainedTokenizerFast

from litgpt.data.modules.conversations import Conversations
from litgpt.data.read.conversation import to_conversation
from litgpt.data.render.chat_template import read_template
from litgpt.data.render.prompt_format import build_style_files
from litgpt.data.render.prompt_styles import ChatML, PromptStyle, load_prompt_style, load_styles
from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.infer.prompts import PromptEncoder
from litgpt.store.tokenizer_files import copy_tokenizer
from tests.data.templates import KINDS, write_tokenizer

MESSAGES = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "It's a dog."}]
SYSTEM = {"role": "system", "content": "It's 'you'\n"}
OTHER = (
    "{%- macro head(role) %}{% if loud %}{{ role | upper }}{% else %}{{ role }}{% endif %}{% endmacro %}"
    "{% for m in messages %}### {{ head(m.role) }}{{ tag }}: {{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}### {{ head('assistant') }}: {% endif %}{% if enable_thinking %}{% endif %}"
)


def save(folder: Path, data: Any) -> PreTrainedTokenizerFast:
    """The tokenizer, as transformers loads it, of a folder that a run of this data would write."""
    folder.mkdir()
    copy_tokenizer(data.tokenizer.folder, folder, data.prompt_files())
    return PreTrainedTokenizerFast.from_pretrained(folder)


def ends_of(folder: Path) -> list[int]:
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    return ends if isinstance(ends, list) else [ends]


@pytest.mark.parametrize("kind", ["chatml", "llama3", "gemma", "qwen3"])
@pytest.mark.parametrize(
    "settings", [{}, {"chat_template": OTHER, "template_args": {"loud": True, "tag": "'\n é", "enable_thinking": None}}]
)
def test_transformers_renders_what_was_trained(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    tokenizer = write_tokenizer(tmp_path / "model", kind)
    (tmp_path / "other.jinja").write_text(OTHER)
    paths = {"chat_template": tmp_path / "other.jinja"} if settings else {}
    data = Conversations(sources="a.jsonl", **{**settings, **paths}, system=SYSTEM["content"] if settings else None)
    data.connect(tokenizer)
    theirs = save(tmp_path / "saved", data)
    conversation = to_conversation({"messages": ([SYSTEM] if settings else []) + MESSAGES})
    trained = data.build_renderer().render(conversation)[0]
    assert theirs.apply_chat_template(MESSAGES, tokenize=False) == trained
    end = "<|im_end|>" if settings else KINDS[kind][3]
    assert tokenizer.token_to_id(end) in ends_of(tmp_path / "saved")
    if settings:
        assert "### USER'\n é: the fox" in trained and "It's 'you'" in trained
        assert "### user'" in theirs.apply_chat_template(MESSAGES, tokenize=False, loud=False)
    # and so does generation, from this folder and from a copy of it
    copy_tokenizer(tmp_path / "saved", tmp_path)
    for folder in (tmp_path, tmp_path / "saved"):
        encoder = PromptEncoder(Tokenizer(folder), read_template(folder), None)
        ids = encoder.encode("the fox", None, None).ids
        text = theirs.apply_chat_template(MESSAGES[:1], tokenize=False, add_generation_prompt=True)
        assert tokenizer.processor.decode(ids, skip_special_tokens=False) == text
        assert set(ends_of(tmp_path / "saved")) <= set(encoder.get_stops(None)[0])


def test_a_template_with_another_for_tools_stays_whole(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "model", "chatml")
    folder = tmp_path / "model"
    (folder / "chat_template.jinja").write_text("a{% for m in messages %}{{ m.content }}{% endfor %}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("b{{ tools | length }}{% if x %}{% endif %}")
    (folder / "prompt_style.yaml").write_text("class_path: litgpt.prompts.Alpaca\n")  # of an earlier run
    data = Conversations(sources="a.jsonl")
    data.connect(tokenizer)
    theirs = save(tmp_path / "saved", data)
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert theirs.apply_chat_template(MESSAGES[:1], tools=tools, tokenize=False) == "b1"
    assert theirs.apply_chat_template(MESSAGES[:1], tokenize=False) == "athe fox"
    assert not (tmp_path / "saved" / "prompt_style.yaml").exists()
    data = Conversations(sources="a.jsonl", template_args={"x": 1})
    data.connect(tokenizer)
    assert save(tmp_path / "again", data).apply_chat_template(MESSAGES[:1], tools=tools, tokenize=False) == "b1"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "louder",
            "data.template_args.louder: True has no effect, because .*other.jinja does not read it; did you mean loud?",
        ),
        ("x", "data.template_args.x: True .*; leave it out; it reads enable_thinking, loud, tag"),
        ("messages", "data.template_args.messages: True would replace that of each conversation; leave it out"),
    ],
)
def test_a_variable_that_no_template_reads_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "other.jinja").write_text(OTHER)
    data = Conversations(sources="a.jsonl", chat_template=tmp_path / "other.jinja", template_args={name: True})
    data.connect(write_tokenizer(tmp_path / "model", "chatml"))
    with pytest.raises(UserError, match=message):
        data.build_renderer()


@pytest.mark.parametrize("name", load_styles())
def test_a_prompt_style_is_a_chat_template_too(tmp_path: Path, name: str) -> None:
    tokenizer = write_tokenizer(tmp_path / "model", "llama3")
    style = PromptStyle.from_name(name)
    data = Conversations(sources="a.jsonl", prompt_style=name)
    data.connect(tokenizer)
    theirs, saved = save(tmp_path / "saved", data), tmp_path / "saved"
    assert type(load_prompt_style(saved)) is type(style) and ends_of(saved)[0] == tokenizer.eos_id
    if style.apply("x") == "x":
        assert theirs.chat_template is None
        encoder = PromptEncoder(Tokenizer(saved), read_template(tokenizer.folder), style)
        assert not encoder.has_format(None)  # the folder's template is not what was trained
        return
    (example,) = data.build_renderer().build_examples([to_conversation({"messages": MESSAGES * 2})])
    text = theirs.apply_chat_template(MESSAGES * 2, tokenize=False)
    assert text == tokenizer.processor.decode(example.ids, skip_special_tokens=False)
    if style.apply("x", sys_prompt="y") != style.apply("x"):
        (example,) = data.build_renderer().build_examples([to_conversation({"messages": [SYSTEM, *MESSAGES]})])
        text = theirs.apply_chat_template([SYSTEM, *MESSAGES], tokenize=False)
        assert text == tokenizer.processor.decode(example.ids, skip_special_tokens=False)


def test_arguments_of_a_style_and_ends_that_were_listed_are_kept(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path, "chatml")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8], "top_k": 3}))
    files = build_style_files(ChatML("Be brief."), Tokenizer(tmp_path))
    eos = tokenizer.eos_id
    assert json.loads(files["generation_config.json"]) == {"eos_token_id": [7, 8, eos], "top_k": 3}
    (tmp_path / "prompt_style.yaml").write_text(files["prompt_style.yaml"])
    assert load_prompt_style(tmp_path).apply("a") == ChatML("Be brief.").apply("a")
