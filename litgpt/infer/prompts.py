"""What a model reads for a prompt: the prompt as it is, or in the form that the model was trained with."""

from dataclasses import dataclass

from litgpt.data.render.chat_template import ChatTemplate
from litgpt.data.render.prompt_styles import PromptStyle
from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError


@dataclass(frozen=True)
class Prompts:
    """The ways in which a model can be asked.

    Attributes:
        chat: the chat template of its folder, or None.
        style: the prompt style that its folder names, or None; what it was trained with last, so before the template.
    """

    tokenizer: Tokenizer
    chat: ChatTemplate | None
    style: PromptStyle | None

    def wraps(self, chat_template: bool | None) -> bool:
        """Whether a prompt is what a user says, and the text a reply; else the text goes on from the prompt.

        Args:
            chat_template: False for the prompt as it is; True for the folder's template; None for what the folder has.

        Raises:
            UserError: if a chat template is asked for and there is none.
        """
        if chat_template and self.chat is None:
            raise UserError(f"chat_template: true, but {self.tokenizer.folder} has none; give false or null")
        return chat_template is not False and (self.chat is not None or self._styled(chat_template))

    def _styled(self, chat_template: bool | None) -> bool:
        return chat_template is None and self.style is not None and self.style.apply("x") != "x"

    def tokens(self, prompt: str, sys_prompt: str | None, chat_template: bool | None) -> list[int]:
        """The tokens that the model reads.

        Raises:
            UserError: if there is no place for `sys_prompt`, or the template refuses the prompt.
        """
        if not self.wraps(chat_template):
            if sys_prompt is not None:
                raise no_place(sys_prompt, f"{self.tokenizer.folder} has no chat template in use")
            return self.tokenizer.encode(prompt).tolist()
        if self._styled(chat_template):
            assert self.style is not None
            text = self.style.apply(prompt, sys_prompt=sys_prompt)
            if sys_prompt and text == self.style.apply(prompt):
                raise no_place(sys_prompt, f"the prompt style {type(self.style).__name__} writes none")
            return self.tokenizer.encode(text).tolist()
        assert self.chat is not None
        system = [] if sys_prompt is None else [{"role": "system", "content": sys_prompt}]
        messages = [*system, {"role": "user", "content": prompt}]
        return self.tokenizer.encode(self.chat.render(messages, self.tokenizer.special_tokens()), bos=False).tolist()

    def stops(self, chat_template: bool | None) -> tuple[list[int], list[str]]:
        """The tokens that end a text, and the texts that do."""
        sequences = [[number] for number in self.tokenizer.stop_ids]
        if self._styled(chat_template):
            assert self.style is not None
            sequences += [list(sequence) for sequence in self.style.stop_tokens(self.tokenizer) if sequence]
        texts = [self.tokenizer.decode(sequence) for sequence in sequences if len(sequence) > 1]
        return [sequence[0] for sequence in sequences if len(sequence) == 1], [text for text in texts if text]


def no_place(sys_prompt: str, reason: str) -> UserError:
    """The error for a system prompt that the model cannot be told."""
    return UserError(f"sys_prompt: {sys_prompt[:40]!r} has no place, for {reason}; put it into the prompt")
