"""The files that hold the prompt format of a finished run, in the forms of transformers and of LitGPT.

They are the chat template with the settings that it was trained with, prompt_style.yaml, and the tokens that end a
reply in generation_config.json.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from litgpt.data.render.chat_template import ADDITIONAL_TEMPLATES, TEMPLATE_FILES, ChatTemplate, find_turn_ends
from litgpt.data.render.prompt_styles import PROMPT_STYLE_FILE, PromptStyle, dump_prompt_style
from litgpt.data.tokenizer import Tokenizer
from litgpt.files import read_json_object

TEMPLATE, TOKENIZER_CONFIG, GENERATION_CONFIG = "chat_template.jinja", "tokenizer_config.json", "generation_config.json"
PROMPT, SYSTEM = "\U000f8a35", "\U000f8a36"
"""Private-use characters, which stand for the user's and the system's message in the text of a prompt style."""


def build_template_files(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    *,
    variables: Mapping[str, Any] | None = None,
    system: str | None = None,
) -> dict[str, str]:
    """Build the files of a chat template, text by name.

    Args:
        template: of the tokenizer's folder, or a replacement of it.
        variables: extra template variables; they become defaults, which a caller may still override.
        system: the system message of conversations without one.
    """
    defaults = write_defaults(variables or {}, system)
    own_files = list_template_files(tokenizer.folder)
    if template.path.parent == tokenizer.folder and not defaults:
        files = {str(path.relative_to(tokenizer.folder)): path.read_text(encoding="utf-8") for path in own_files}
    else:
        source, with_tools, _ = template.sources
        files = {TEMPLATE: defaults + source} | remove_template(tokenizer.folder)
        if with_tools is not None:
            files[f"{ADDITIONAL_TEMPLATES}/tool_use.jinja"] = defaults + with_tools
    return files | extend_stop_ids(tokenizer, find_turn_ends(template, tokenizer, variables))


def write_defaults(variables: Mapping[str, Any], system: str | None) -> str:
    """Write the jinja lines that set default variables and a default system message; empty for none."""
    lines = [
        f"{{%- if {name} is not defined %}}{{% set {name} = {value!r} %}}{{% endif %}}\n"
        for name, value in variables.items()
    ]
    if system is not None:
        message = {"role": "system", "content": system}
        lines.append(
            "{%- if messages and messages[0]['role'] != 'system' %}"
            f"{{% set messages = [{message!r}] + messages %}}{{% endif %}}\n"
        )
    return "".join(lines)


def list_template_files(folder: Path) -> list[Path]:
    """List the files of a folder that hold nothing but its chat template."""
    names = [name for name in TEMPLATE_FILES if name != TOKENIZER_CONFIG]
    files = [folder / name for name in names if (folder / name).is_file()]
    return files + sorted((folder / ADDITIONAL_TEMPLATES).glob("*.jinja"))


def remove_template(folder: Path) -> dict[str, str]:
    """The tokenizer_config.json of a folder without its chat template; empty if it has none."""
    values = read_json_object(folder / TOKENIZER_CONFIG)
    if values.pop("chat_template", None) is None:
        return {}
    return {TOKENIZER_CONFIG: json.dumps(values, indent=1, ensure_ascii=False) + "\n"}


def build_style_files(style: PromptStyle, tokenizer: Tokenizer) -> dict[str, str]:
    """Build the files of a prompt style: LitGPT's, and a chat template with the same text, if there is one."""
    files = {PROMPT_STYLE_FILE: dump_prompt_style(style)} | remove_template(tokenizer.folder)
    if (template := convert_style(style, tokenizer)) is not None:
        files[TEMPLATE] = template
    ends = [sequence[0] for sequence in style.stop_tokens(tokenizer) if len(sequence) == 1]
    return files | extend_stop_ids(tokenizer, ends)


def convert_style(style: PromptStyle, tokenizer: Tokenizer) -> str | None:
    """Convert a prompt style to a chat template that renders conversations as they are trained.

    Returns None for a style that adds nothing, or changes the message itself, and for a tokenizer.model.
    """
    plain, with_system = style.apply(PROMPT), style.apply(PROMPT, sys_prompt=SYSTEM)
    is_fixed = style.apply(PROMPT * 2) == plain.replace(PROMPT, PROMPT * 2)
    if plain == PROMPT or not is_fixed or tokenizer.backend != "huggingface":
        return None
    ids = (tokenizer.bos_id, tokenizer.eos_id)
    bos, end = ("" if number is None else tokenizer.processor.id_to_token(number) for number in ids)
    begin = bos if tokenizer.use_bos and not plain.startswith(bos) else ""
    system = f"{{{{ {quote_style(with_system)} }}}}"
    if with_system == plain:
        system = "{{ raise_exception('the prompt style has no system message') }}"
    return (
        f"{{{{ {begin!r} }}}}{{% for message in messages %}}"
        "{% if message['role'] == 'user' %}"
        f"{{% if loop.index0 == 1 and messages[0]['role'] == 'system' %}}{system}"
        f"{{% else %}}{{{{ {quote_style(plain)} }}}}{{% endif %}}"
        f"{{% elif message['role'] == 'assistant' %}}{{{{ message['content'] + {end!r} }}}}"
        "{% elif message['role'] != 'system' or not loop.first %}"
        "{{ raise_exception('the prompt style has only user, assistant, and a first system message') }}"
        "{% endif %}{% endfor %}"
    )


def quote_style(text: str) -> str:
    """Write the text of a prompt style as a jinja expression."""
    values = {PROMPT: "message['content']", SYSTEM: "messages[0]['content']"}
    parts = [values.get(part) or repr(part) for part in re.split(f"([{PROMPT}{SYSTEM}])", text) if part]
    return " + ".join(parts)


def extend_stop_ids(tokenizer: Tokenizer, ends: Iterable[int]) -> dict[str, str]:
    """The generation_config.json of a tokenizer's folder with more tokens that end a text; empty if it has them all."""
    folder = tokenizer.folder
    values = read_json_object(folder / GENERATION_CONFIG)
    listed = values.get("eos_token_id")
    listed = listed if isinstance(listed, list) else [] if listed is None else [listed]
    ids = list(dict.fromkeys([*listed, *tokenizer.stop_ids, *ends]))
    if ids == listed:
        return {}
    others = {} if values else read_json_object(folder / "config.json")
    kept = {key: others[key] for key in ("bos_token_id", "pad_token_id") if others.get(key) is not None}
    values = {**kept, **values, "eos_token_id": ids if len(ids) > 1 else ids[0]}
    return {GENERATION_CONFIG: json.dumps(values, indent=1) + "\n"}
