"""`litgpt chat`: a chat with a model in the terminal."""

import json
import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from litgpt.errors import UserError
from litgpt.generation import load_llm
from litgpt.infer.chat.history import NO_FILES, ChatHistory
from litgpt.infer.chat.model import Answer, ChatModel
from litgpt.infer.chat.terminal import ChatTerminal, hide_typed_text
from litgpt.infer.prompts import PromptEncoder
from litgpt.infer.text_settings import get_text_settings, prepare_texts
from litgpt.interrupts import notice_interrupt, suspend_exit_on_interrupt
from litgpt.recipe.chat import Chat
from litgpt.recipe.generate import MEDIA_NOUNS


def run(recipe: Chat) -> None:
    """Load the model, and answer messages until the end of the chat."""
    llm = load_llm(recipe.checkpoint_dir, recipe, access_token=recipe.access_token)
    encoder = llm.prompt_encoder()
    history = ChatHistory(encoder, recipe.chat_template)
    history.set_system(recipe.sys_prompt)
    rows = llm.config.padded_vocab_size or 0
    settings = prepare_texts(encoder, rows=rows, chat_template=recipe.chat_template, **get_text_settings(recipe))
    model = ChatModel(llm.model, llm.tokenizer, history, settings, compile=recipe.compile)
    terminal = ChatTerminal(multiline=recipe.multiline)
    torch.manual_seed(recipe.seed)
    terminal.print_line(f"Now chatting with {llm.config.name}.")
    terminal.print_line("An empty prompt, !quit or Ctrl-D ends the chat; /help lists its commands.")
    if not history.keeps_turns:
        terminal.print_line(describe_single_turns(encoder, recipe.chat_template))
    with ExitStack() as stack:
        if terminal.is_interactive:
            stack.enter_context(suspend_exit_on_interrupt())
        terminal.print_line()
        while (message := terminal.read_message()) is not None:
            try:
                if not run_slash_command(message, model, terminal):
                    answer_message(message, model, terminal)
            except UserError as error:
                terminal.print_error(str(error))
            terminal.print_line()


def describe_single_turns(encoder: PromptEncoder, chat_template: bool | None) -> str:
    """Why a model does not see earlier prompts."""
    if encoder.has_format(chat_template):
        return f"The prompt style {type(encoder.style).__name__} is for single prompts: the model sees only the last."
    return "Without a chat template or prompt style, the model continues the text of each prompt, and sees no other."


def answer_message(message: str, model: ChatModel, terminal: ChatTerminal) -> None:
    """Write the answer to a message, and what it took; Ctrl-C at a terminal ends only the answer."""
    message = message.strip()
    start, request = time.perf_counter(), model.build_request(message)
    with ExitStack() as stack:
        is_stopped = stack.enter_context(notice_interrupt()).is_set if terminal.is_interactive else lambda: False
        stack.enter_context(hide_typed_text())
        writer = terminal.start_reply()
        try:
            answer = model.answer(message, request, on_text=writer.write, is_stopped=is_stopped)
        finally:
            writer.finish()
    seconds = time.perf_counter() - start
    share, speed = (answer.prompt_tokens + answer.tokens) / model.context, answer.tokens / seconds
    terminal.print_notice(
        f"Time for inference: {seconds:.2f} sec total, {speed:.2f} tokens/sec, {answer.tokens} tokens, "
        f"context {share:.0%}"
    )
    if line := describe_ending(answer, model):
        terminal.print_notice(line)


def describe_ending(answer: Answer, model: ChatModel) -> str:
    """Why an answer is not complete, or empty; an empty line otherwise."""
    if answer.end == "interrupt":
        return "Stopped." if answer.text else "Stopped before the answer began: the message is not kept."
    if answer.end == "max_new_tokens":
        return f"The answer ended at max_new_tokens: {answer.tokens}; set a larger one for longer answers."
    if answer.end == "context":
        return f"The answer ended at the model's context of {model.context:,} tokens; /reset begins again."
    return "" if answer.text else "The answer is empty: the message is not kept."


def set_system(text: str, model: ChatModel, terminal: ChatTerminal) -> None:
    """Set or remove the system message."""
    model.history.set_system(text or None)
    terminal.print_line("The system message is set." if text else "There is no system message.")


def reset(text: str, model: ChatModel, terminal: ChatTerminal) -> None:
    """Begin a new conversation."""
    refuse_text("/reset", text)
    model.history.exchanges.clear()
    model.history.media = NO_FILES
    terminal.print_line("A new conversation begins.")


def add_medium(kind: str, text: str, model: ChatModel, terminal: ChatTerminal) -> None:
    """Add a medium to the next message, or remove those of its kind that were added."""
    if text:
        model.history.add_medium(kind, str(Path(text).expanduser().absolute()))
    else:
        model.history.remove_media(kind)
    terminal.print_line(f"{kind.capitalize()}s of the next message: {len(model.history.media.get(kind, ()))}")


def save(text: str, model: ChatModel, terminal: ChatTerminal) -> None:
    """Write the conversation to a new file."""
    path, rows = Path(text).expanduser(), model.history.list_rows()
    if path.suffix != ".jsonl":
        raise UserError(f"/save: {text!r} is not the name of a .jsonl file; write /save chat.jsonl, for example")
    if not rows:
        raise UserError("/save: there is no answer to save; write a message first")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except FileExistsError:
        raise UserError(f"/save: {path} exists, and is not overwritten; use another name") from None
    except OSError as error:
        raise UserError(f"/save: {path} cannot be written ({error.strerror}); use another name") from None
    terminal.print_line(f"Saved to {path}.")


def show_help(text: str, _model: ChatModel, terminal: ChatTerminal) -> None:
    """List the commands."""
    refuse_text("/help", text)
    for name, command in SLASH_COMMANDS.items():
        terminal.print_line(f"{f'{name} {command.argument}':14}{command.help}")
    terminal.print_line(f"{'Ctrl-C':14}stop an answer; what is written of it stays in the conversation")
    terminal.print_line(f"{'!quit':14}end the chat, as an empty prompt and Ctrl-D do")


def refuse_text(name: str, text: str) -> None:
    """Check that nothing follows the name of a command."""
    if text:
        raise UserError(f"{name}: {text[:40]!r} has no effect; leave it out")


class SlashCommand(NamedTuple):
    """A command of the chat: its argument and description in `/help`, and what it does with its text."""

    argument: str
    help: str
    run: Callable[[str, ChatModel, ChatTerminal], None]


SLASH_COMMANDS = {
    "/system": SlashCommand("TEXT", "set the system message; without TEXT, remove it", set_system),
    "/reset": SlashCommand("", "begin a new conversation, with the same system message", reset),
    **{
        f"/{kind}": SlashCommand(
            "FILE", f"add {noun} to the next message; without FILE, remove those added", partial(add_medium, kind)
        )
        for kind, noun in MEDIA_NOUNS.items()
    },
    "/save": SlashCommand("FILE", "save the conversation as a new .jsonl file to train on", save),
    "/help": SlashCommand("", "list these commands", show_help),
}


def run_slash_command(message: str, model: ChatModel, terminal: ChatTerminal) -> bool:
    """Run the command that a message is; whether it is one.

    Raises:
        UserError: if there is no such command.
    """
    words = re.fullmatch(r"(/[a-z]*)(?:\s+(.*?))?\s*", message, flags=re.DOTALL)
    if words is None:
        return False
    if words[1] not in SLASH_COMMANDS:
        names = ", ".join(SLASH_COMMANDS)
        raise UserError(f"{words[1]}: not a command; use {names}, or begin a message with a space")
    SLASH_COMMANDS[words[1]].run(words[2] or "", model, terminal)
    return True
