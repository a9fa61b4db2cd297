"""Chat templates: rendered byte for byte as transformers does, and templates that are wrong or hostile."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from litgpt.data.read.media import MARK, MEDIA_KINDS
from litgpt.data.render.chat_template import read_template
from litgpt.data.tokenizer import BOS, EOS, Tokenizer, train_tokenizer
from litgpt.errors import UserError

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TRIMMED = """{{ bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {{- '[SYS] ' + message.content | trim }}
    {% elif loop.index0 is odd %}
        {% generation %}{{ message.content | tojson }}{{ eos_token }}{% endgeneration %}
    {%- else %}
        {{- raise_exception('no text') if not message.content else message['content'] }}
    {% endif %}
    {%- if loop.index > 8 %}{% break %}{% endif %}
{%- endfor %}
{% set ns = namespace(found=false) %}{% if not tools %}{% set ns.found = true %}{% endif %}
{{ ns.found }} {{ strftime_now('%Y') | length }} {{ unk_token }}
"""
CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "What is <b>1 + 1</b>? \"quote\" & 'é' 日本\n"}],
    [{"role": "system", "content": "  You count.\n\n"}, {"role": "user", "content": "1, 2, "}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello <there>"},
        {"role": "user", "content": "{{ messages }}"},
    ],
]


def folder_with(folder: Path, template: Any, *, name: str = "tokenizer_config.json") -> Path:
    train_tokenizer([], "bytes", 258, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    if name == "chat_template.jinja":
        (folder / name).write_text(template, encoding="utf-8")
    else:
        config = config if name == "tokenizer_config.json" else {}
        (folder / name).write_text(json.dumps(config | {"chat_template": template}), encoding="utf-8")
    return folder


def assert_equals_transformers(folder: Path, chats: list[list[dict[str, str]]]) -> None:
    from transformers import AutoTokenizer

    reference, template, tokenizer = AutoTokenizer.from_pretrained(folder), read_template(folder), Tokenizer(folder)
    assert template is not None
    for chat in chats:
        for prompting in (True, False):
            wanted = reference.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompting)
            text = template.render(chat, tokenizer.special_tokens(), add_generation_prompt=prompting)
            assert text == wanted
            numbers = reference.apply_chat_template(chat, add_generation_prompt=prompting, return_dict=False)
            assert tokenizer.encode(text, bos=False).tolist() == numbers


@pytest.mark.parametrize("template", [CHATML, TRIMMED], ids=["chatml", "trimmed"])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja"])
def test_text_equals_transformers(template: str, name: str, tmp_path: Path) -> None:
    assert_equals_transformers(folder_with(tmp_path / "t", template, name=name), CHATS)


def test_the_default_of_several_templates(tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": CHATML}]
    assert_equals_transformers(folder_with(tmp_path / "t", several), CHATS)


def test_its_own_file_goes_before_the_settings(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "t", "settings")
    assert str(read_template(folder).path).endswith("tokenizer_config.json")  # type: ignore[union-attr]
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "older"}))
    assert read_template(folder).render([], {}) == "older"  # type: ignore[union-attr]
    (folder / "chat_template.jinja").write_text("newer")
    assert read_template(folder).render([], {}) == "newer"  # type: ignore[union-attr]


def test_a_folder_without_one(tmp_path: Path) -> None:
    train_tokenizer([], "bytes", 258, tmp_path / "t")
    assert read_template(tmp_path / "t") is None
    assert Tokenizer(tmp_path / "t").special_tokens() == {"bos_token": BOS, "eos_token": EOS}


def test_marks_of_media_that_a_template_does_not_write_stay_in_its_texts(tmp_path: Path) -> None:
    source = (
        "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'text' %}"
        "{{ part['text'] | trim }}|{% elif part['type'] == 'image' %}<image>{% endif %}{% endfor %}{% endfor %}"
    )
    template = read_template(folder_with(tmp_path / "t", source))
    assert template is not None
    video = MEDIA_KINDS["video"].mark
    content = f"{video}Is {MARK} in {video}it?"
    assert template.render([{"role": "user", "content": content}], {}) == f"{video}Is|<image>in {video}it?|"


def test_an_architecture_that_is_published_without_one(tmp_path: Path) -> None:
    train_tokenizer([], "bytes", 258, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "paligemma"}))

    def write(*messages: tuple[str, str]) -> str:
        template, chat = read_template(tmp_path), [{"role": role, "content": content} for role, content in messages]
        assert template is not None
        return template.render(chat, Tokenizer(tmp_path).special_tokens())

    asked, answer = ("user", f"{MARK}caption\nen"), ("assistant", "a cat ")
    assert write(asked) == f"<image>{BOS}caption\nen\n"
    assert write(asked, answer, ("user", "Why?")) == f"<image>{BOS}caption\nen\na cat {EOS}Why?\n"
    assert write(("user", f"{MARK} or {MARK}, which?")) == f"<image> or <image>{BOS}, which?\n"
    assert write(("user", "Hello")) == f"{BOS}Hello\n"
    with pytest.raises(UserError, match="PaliGemma has only user and assistant messages"):
        write(("system", "Be brief."), asked)
    (tmp_path / "chat_template.jinja").write_text("its own")
    assert write(asked) == "its own"


def test_turns_of_chameleon(tmp_path: Path) -> None:
    train_tokenizer([], "bytes", 258, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "chameleon"}))
    template, special = read_template(tmp_path), {**Tokenizer(tmp_path).special_tokens(), "sep_token": "<sep>"}
    assert template is not None
    chat = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    assert template.render(chat[:1], special) == f"{BOS}Why?<sep>"
    assert template.render([*chat, *chat], special) == f"{BOS}Why?<sep>So.{EOS}Why?<sep>So.{EOS}"
    with pytest.raises(UserError, match="Chameleon has only user and assistant messages"):
        template.render([{"role": "system", "content": "Be brief."}, *chat], special)


def test_what_a_published_processor_writes_before_a_chat(tmp_path: Path) -> None:
    train_tokenizer([], "bytes", 258, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "janus"}))
    (tmp_path / "chat_template.jinja").write_text("{% for message in messages %}\n{{ message['content'] }}{% endfor %}")
    special, chat = Tokenizer(tmp_path).special_tokens(), [{"role": "user", "content": "Why?"}]

    def write(**variables: str) -> str:
        template = read_template(tmp_path)
        assert template is not None
        return template.render(chat, special, variables=variables)

    assert write() == f"{BOS}Why?"
    (tmp_path / "processor_config.json").write_text(json.dumps({"use_default_system_prompt": True}))
    start, _, end = write().partition("a helpful language and vision assistant")
    assert (start, end[:14], end[-7:]) == (f"{BOS}You are ", ". You are able", ".\n\nWhy?")
    assert write(generation_mode="image") == f"{BOS}Why?"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert write() == "Why?"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for %}", "not a chat template"),
        (3, "chat_template is int"),
        ("{{ raise_exception('System role not supported') }}", "rejects this conversation .System role not supported"),
        ("{{ messages[7].content }}", "rejects this conversation"),
        ("{% include 'secret' %}", "rejects this conversation"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "rejects this conversation"),
        ("{{ messages.__init__.__globals__ }}", "rejects this conversation"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "rejects this conversation"),
        ("{{ lipsum.__globals__['os'].popen('true').read() }}", "rejects this conversation"),
        ("{% set _ = messages.append({}) %}", "rejects this conversation"),
        ("{{ range(10000000) | list }}", "rejects this conversation"),
    ],
)
def test_wrong_and_hostile_templates_end_in_one_line(template: Any, said: str, tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "t", template)
    with pytest.raises(UserError, match=said) as caught:
        read_template(folder).render(CHATS[0], {})  # type: ignore[union-attr]
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SmolLM2", "tok/qwen3", "tok/llama3", "tok/gemma3", "tok/deepseek_v3"])
def test_published_templates_equal_transformers(name: str) -> None:
    root = os.environ.get("LITGPT_TEST_ASSETS")
    if not root or not (Path(root) / name).exists():
        pytest.skip(f"LITGPT_TEST_ASSETS names no folder with {name}")
    assert_equals_transformers(Path(root) / name, CHATS)
