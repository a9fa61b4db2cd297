"""Chats: prompts of several turns, what of them is computed again, full contexts, and answers that are stopped."""

from pathlib import Path
from typing import Any

import pytest

from litgpt.api import LLM
from litgpt.errors import UserError
from litgpt.infer.chat.history import ChatHistory
from litgpt.infer.chat.model import Answer, ChatModel
from litgpt.infer.text_settings import prepare_texts
from tests.chat_model import write_chat_model
from tests.data.render.test_chat_template import CHATML

HELLO = "the fox and the dog jump over a lazy cat"


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return LLM.load(write_chat_model(tmp_path_factory.mktemp("chat") / "tiny"), distribute=None)


def start_chat(llm: LLM, chat_template: bool | None = None, **settings: Any) -> ChatModel:
    """A chat whose model writes only the letter q, which no other letter is merged with."""
    encoder = llm.prompt_encoder()
    [letter] = llm.tokenizer.encode("q", bos=False).tolist()
    given: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0, "logit_bias": {letter: 1e4}, **settings}
    texts = prepare_texts(encoder, rows=llm.config.padded_vocab_size or 0, chat_template=chat_template, **given)
    return ChatModel(llm.model, llm.tokenizer, ChatHistory(encoder, chat_template), texts)


def ask(chat: ChatModel, message: str, stop_after: int = 10**6) -> Answer:
    pieces: list[str] = []
    request = chat.build_request(message)
    answer = chat.answer(message, request, on_text=pieces.append, is_stopped=lambda: len(pieces) >= stop_after)
    assert "".join(pieces) == answer.text
    return answer


def test_a_later_turn_computes_only_what_is_new(llm: LLM, processed: list[int]) -> None:
    chat = start_chat(llm)
    prompts = []
    for number in range(4):
        processed.clear()
        answer = ask(chat, HELLO)
        assert answer.text == "q" * 8 and answer.end == "max_new_tokens" and answer.tokens == 8
        prompts.append(answer.prompt_tokens)
        new = prompts[0] if number == 0 else prompts[-1] - prompts[-2] - 7  # the last q was not an input yet
        assert processed == [new, *[1] * 7]
    text = llm.tokenizer.decode(list(chat.history.encode("it rains").ids))
    turn = f"<|im_start|>user\n{HELLO}<|im_end|>\n<|im_start|>assistant\n{'q' * 8}<|im_end|>\n"
    assert text == turn * 4 + "<|im_start|>user\nit rains<|im_end|>\n<|im_start|>assistant\n"
    tokens = chat._engine.cache.allocated_tokens
    assert prompts[-1] < tokens <= 4 * 512  # not room for many texts


def test_a_chat_equals_one_without_a_cache(llm: LLM) -> None:
    chat, alone = start_chat(llm, logit_bias={}), start_chat(llm, logit_bias={})
    for number in range(3):
        message = f"{HELLO} {number}"
        alone.history.exchanges = list(chat.history.exchanges)
        alone._engine.cache.blocks.clear()
        assert ask(chat, message).text == ask(alone, message).text


def test_a_full_context_is_an_error_and_drops_nothing(llm: LLM) -> None:
    chat = start_chat(llm, max_new_tokens=100)
    chat.history.add("", "an answer")
    size = 512 - 10 - len(chat.history.encode("a").ids)
    chat.history.exchanges.clear()
    chat.history.add("q" * size, "an answer")
    last = ask(chat, "a")  # as long as the context permits
    assert (last.text, last.tokens, last.end) == ("q" * 10, 10, "context")
    for _ in range(2):
        with pytest.raises(UserError, match=r"^the conversation with this message has \d+ tokens, but the model's con"):
            ask(chat, "a")
    assert [exchange.answer for exchange in chat.history.exchanges] == ["an answer", last.text]
    chat.history.exchanges.clear()
    with pytest.raises(UserError, match=r"^this message has \d+ tokens, but the model's context is 512; write less$"):
        ask(chat, "q" * 520)


def test_a_stopped_answer_is_kept_as_far_as_it_is(llm: LLM) -> None:
    chat = start_chat(llm)
    answer = ask(chat, HELLO, stop_after=3)
    assert (answer.text, answer.tokens, answer.end) == ("qqq", 3, "interrupt")
    assert [exchange.answer for exchange in chat.history.exchanges] == ["qqq"]
    assert not chat._engine.has_work
    answer = ask(chat, HELLO, stop_after=0)
    assert (answer.text, answer.tokens, answer.end) == ("", 0, "interrupt")
    assert len(chat.history.exchanges) == 1  # an answer without text is not kept, nor is its message


def test_the_system_message_is_that_of_the_whole_chat(llm: LLM) -> None:
    chat = start_chat(llm)
    ask(chat, HELLO)
    before = llm.tokenizer.decode(list(chat.history.encode("a").ids))
    chat.history.set_system("be kind")
    assert (
        llm.tokenizer.decode(list(chat.history.encode("a").ids)) == f"<|im_start|>system\nbe kind<|im_end|>\n{before}"
    )
    assert [message["role"] for message in chat.history.list_rows()[0]["messages"]] == ["system", "user", "assistant"]


def test_without_a_template_each_message_is_on_its_own(llm: LLM) -> None:
    chat = start_chat(llm, chat_template=False)
    for message in (HELLO, "it rains"):
        ask(chat, message)
    assert not chat.history.keeps_turns
    assert llm.tokenizer.decode(list(chat.history.encode("a").ids)) == "a"
    with pytest.raises(UserError, match="sys_prompt: 'be kind' is not supported with"):
        chat.history.set_system("be kind")
    assert chat.history.system is None
    rows = [[message["content"] for message in row["messages"]] for row in chat.history.list_rows()]
    assert rows == [[HELLO, "q" * 8], ["it rains", "q" * 8]]


def test_a_prompt_style_has_turns_if_the_template_has_the_same_text(llm: LLM, tmp_path: Path) -> None:
    llm.save(tmp_path / "alpaca", prompt_style="alpaca")  # with a template of its turns, as finetuning writes it
    folders = {"alpaca": True, "default": False, "other": False}
    for name in ("default", "other"):
        llm.save(tmp_path / name, prompt_style="alpaca" if name == "other" else name)
        (tmp_path / name / "chat_template.jinja").write_text(CHATML)
    for name, keeps_turns in folders.items():
        chat = start_chat(LLM.load(tmp_path / name, distribute=None))
        assert chat.history.keeps_turns is keeps_turns
        ask(chat, HELLO)
        assert (HELLO in llm.tokenizer.decode(list(chat.history.encode("a").ids))) is keeps_turns
