"""Render conversations by a model's chat template, with the loss weight of every token."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from litgpt.data.read.conversation import Conversation
from litgpt.data.read.fields import BadRow
from litgpt.data.read.message import list_fields, remove_fields
from litgpt.data.render import spans as text_spans
from litgpt.data.render.chat_template import ChatTemplate, find_turn_ends
from litgpt.data.render.example import Example, Renderer
from litgpt.data.render.loss_weights import WeightRule, split_by_weight
from litgpt.data.render.null_prompt import empty_prompt
from litgpt.data.render.spans import Span
from litgpt.data.render.turns import (
    PLACEHOLDER,
    Turn,
    build_turns,
    fill_content,
    list_spellings,
    make_placeholder,
    rename_reasoning,
)
from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError

if TYPE_CHECKING:
    from litgpt.data.render.code_places import CodePlacer
    from litgpt.data.render.feature_places import FeaturePlacer

TrainOn = Literal["answers", "last_answer", "everything"]
EndOfTurn = Literal["turn", "last", "none"]


@dataclass(frozen=True)
class LossMask:
    """Which tokens of a conversation are trained, unless its messages set `loss`.

    Attributes:
        on: all answers, those after the last question, or every token.
        end_of_turn: whether the token that ends an answer is trained: after every answer, the last one, or none.
        weights: loss weights of the parts of answers that match a pattern.
    """

    on: TrainOn = "answers"
    end_of_turn: EndOfTurn = "turn"
    weights: tuple[WeightRule, ...] = ()

    def __str__(self) -> str:
        # part of the keys of caches on disk, so it must not change with the name of the class
        return f"Trained(on={self.on!r}, end_of_turn={self.end_of_turn!r}, weights={self.weights!r})"


class ChatRenderer(Renderer):
    """Renders conversations by a model's chat template and determines which tokens are trained.

    An answer starts after the header that the template puts before the model's reply and ends before the next message.
    If the template marks answers by `{% generation %}`, the marks are used; otherwise the answer is replaced by a
    placeholder, and the text that does not change is not part of the answer. This also works for templates that write
    an answer in the middle of a conversation differently from the last one, such as without its reasoning.

    Args:
        tokenizer: must be a tokenizer.json, which returns the offset of each token in the text.
        template: the model's chat template.
        loss_mask: which tokens are trained.
        variables: extra template variables, such as `enable_thinking`.
        placer: writes the places of images, or their codes; None for a model that reads none.
        null_prompts: give samples whose answer is an image a prompt without text as well.

    Raises:
        UserError: for another kind of tokenizer.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        loss_mask: LossMask | None = None,
        variables: Mapping[str, Any] | None = None,
        placer: "FeaturePlacer | CodePlacer | None" = None,
        *,
        null_prompts: bool = False,
    ) -> None:
        if tokenizer.backend != "huggingface":
            raise UserError(f"{tokenizer.folder}: chat templates need tokenizer.json; or set data.prompt_style")
        self.tokenizer, self.template, self.loss_mask = tokenizer, template, loss_mask or LossMask()
        self.has_weights, self.placer = bool(self.loss_mask.weights), placer
        self.reads_media, self.null_prompts = placer is not None, null_prompts
        self.variables, self.special = dict(variables or {}), tokenizer.special_tokens()
        self.processor = text_spans.disable_offset_trimming(tokenizer.processor)
        self.added = [token.content for token in tokenizer.processor.get_added_tokens_decoder().values()]
        self.header, self.lead = self._probe_template()
        ends = [tokenizer.processor.id_to_token(end) for end in find_turn_ends(template, tokenizer, self.variables)]
        stop_texts = set(map(tokenizer.processor.id_to_token, tokenizer.stop_ids)) & set(self.added)
        ends = sorted(stop_texts.union(ends), key=len, reverse=True)
        self.end = re.compile(rf"\s*(?:{'|'.join(map(re.escape, ends)) or '(?!)'})")

    def fingerprint_parts(self) -> list[Any]:
        """Everything that the samples depend on besides the conversations, as JSON values."""
        parts = [self.tokenizer.fingerprint(), self.special, self.template.sources, self.variables, str(self.loss_mask)]
        parts += ["null_prompts"] if self.null_prompts else []
        return parts if self.placer is None else [*parts, *self.placer.fingerprint_parts()]

    def build_examples(self, conversations: Sequence[Conversation]) -> list[Example | BadRow]:
        """Tokenize each conversation, in parallel; a BadRow for one that cannot be rendered."""
        rendered = [self.try_render(conversation) for conversation in conversations]
        texts = [item[0] for item in rendered if not isinstance(item, BadRow)]
        encodings = iter(self.processor.encode_batch(texts, add_special_tokens=False))
        return [
            item if isinstance(item, BadRow) else self._try_example(item[1], next(encodings), conversation)
            for item, conversation in zip(rendered, conversations, strict=True)
        ]

    def encode_prompt(self, conversation: Conversation) -> list[int]:
        """Tokens before the first answer, including the header of the reply.

        They are empty for plain text, and with images whose features the model reads.

        Raises:
            BadRow: if an image cannot be read.
        """
        needs_features = self.placer is None or self.placer.media_reader is not None
        if conversation.is_text or (conversation.media and needs_features):
            return []
        turns = build_turns(self._write_marks(conversation))
        first = next((number for number, turn in enumerate(turns) if turn.is_answer), len(turns))
        tools = json.loads(conversation.tools) if conversation.tools else None
        text = self._apply_template(turns[:first], tools, prompt=True) if first else ""
        ids = self.processor.encode(text, add_special_tokens=False).ids
        if self.placer is None or not conversation.media:
            return list(ids)
        roles = [message.role in ("assistant", "tool_call") for message in conversation.messages]
        asked = replace(conversation, messages=conversation.messages[: roles.index(True)])
        placed = self.placer.write_images(np.array(ids, np.int32), np.zeros(len(ids), np.float32), asked)
        return list(map(int, placed.ids))

    def _write_marks(self, conversation: Conversation) -> Conversation:
        return conversation if self.placer is None else self.placer.write_marks(conversation)

    def _try_example(self, spans: list[Span], encoding: Any, conversation: Conversation) -> Example | BadRow:
        """The sample of a rendered conversation; the BadRow if its images cannot be read."""
        example = self._build_example(spans, encoding, conversation)
        if self.placer is None:
            return example
        try:
            placed = self.placer.write_images(example.ids, example.weights, conversation)
            placed = replace(placed, channel=example.channel)
            return self._add_null_prompt(placed, conversation) if self.null_prompts else placed
        except BadRow as error:
            return error

    def _add_null_prompt(self, example: Example, conversation: Conversation) -> Example:
        """The sample with a prompt without text, if its answer is an image.

        Raises:
            BadRow: if the prompt is not the beginning of the sample.
        """
        bare = empty_prompt(conversation)
        if bare is None:
            return example
        prompt = self.encode_prompt(conversation)
        if example.ids[: len(prompt)].tolist() != prompt:
            raise BadRow("the sample does not begin with its prompt", "set data.null_prompt: 0")
        return replace(example, null_prompt=np.array(self.encode_prompt(bare), np.int32), prompt_tokens=len(prompt))

    def _build_example(self, spans: list[Span], encoding: Any, conversation: Conversation) -> Example:
        weights = text_spans.compute_token_weights(spans, np.array(encoding.offsets, np.int64).reshape(-1, 2))
        ids = np.array(encoding.ids, np.int32)
        if not conversation.is_text:
            return Example(ids, weights * np.float32(conversation.weight), conversation.channel)
        # a plain text is framed by bos and eos tokens, and all of it is trained
        ids = self.tokenizer.frame(ids, eos=self.tokenizer.eos_id is not None)
        (message,) = conversation.messages
        weight = conversation.weight * message.weight * (message.loss is not False)
        return Example(ids, np.full(len(ids), weight, np.float32), conversation.channel)

    def render(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """Render a conversation as text with the spans of different loss weights, in order.

        Raises:
            BadRow: if the template rejects the conversation, or omits a part of it.
        """
        for kind in (medium.kind for medium in conversation.media):
            if self.placer is None:
                raise BadRow(f"{kind} data is not supported", "by this model, or with data.streaming: true")
            if conversation.is_text:
                raise BadRow(f"{kind}s in plain text are not supported", "write a question and its answer")
        if conversation.is_text:
            return conversation.messages[0].content, []
        text, turns, tools = self._render_turns(self._write_marks(conversation))
        self._check_complete(text, turns, tools)
        return text, self._build_spans(text, turns, self.find_answers(text, turns, tools))

    def _render_turns(self, conversation: Conversation) -> tuple[str, list[Turn], Any]:
        """Render a conversation as text; returns it with the turns in the form that suits the template, and the tools.

        A null content is passed as null, as in the row; to a template that rejects it, or writes it, as an empty text.
        """
        tools = json.loads(conversation.tools) if conversation.tools else None
        turns = [rename_reasoning(turn, self.template.names) for turn in build_turns(conversation)]
        filled = [fill_content(turn) for turn in turns]
        if filled == turns:
            return self._apply_template(turns, tools), turns, tools
        try:
            text = self._apply_template(turns, tools)
        except BadRow:
            return self._apply_template(filled, tools), filled, tools
        if "None" in text:
            other = self._apply_template(filled, tools)
            if other.count("None") < text.count("None"):
                return other, filled, tools
        return text, turns, tools

    def list_unread(self, conversation: Conversation) -> list[str]:
        """List the names of the fields of messages and calls without which the text is the same."""
        names = list_fields(conversation.messages)
        if not names or conversation.is_text:
            return names

        def render_without(removed: list[str]) -> str | None:
            messages = tuple(remove_fields(message, removed) for message in conversation.messages)
            try:
                return self._render_turns(replace(conversation, messages=messages))[0]
            except BadRow:
                return None

        text = render_without([])
        if text is None:
            return []  # the row is left out and counted
        return names if render_without(names) == text else [name for name in names if render_without([name]) == text]

    def _check_complete(self, text: str, turns: list[Turn], tools: Any) -> None:
        """Check that the text contains the system message, tools and calls, which some templates omit silently.

        Raises:
            BadRow: naming the missing part.
        """
        if tools and self._renders_equal(text, turns, None):
            raise BadRow("the chat template omits tools", "set data.tool_format: hermes")
        for number, turn in enumerate(turns):
            if "tool_calls" in turn.message:
                message = {key: value for key, value in turn.message.items() if key != "tool_calls"}
                other = [*turns[:number], replace(turn, message=message), *turns[number + 1 :]]
                if self._renders_equal(text, other, tools):
                    raise BadRow("the chat template omits tool calls", "set data.tool_format: hermes")
            if turn.message["role"] == "system" and turn.message["content"].strip() not in text:
                raise BadRow("the chat template omits the system message", turn.message["content"][:40])

    def _renders_equal(self, text: str, turns: Sequence[Turn], tools: Any) -> bool:
        try:
            return self._apply_template(turns, tools) == text
        except BadRow:
            return False

    def _apply_template(
        self, turns: Sequence[Turn], tools: Any, *, mark_answers: bool = False, prompt: bool = False
    ) -> str:
        try:
            text = self.template.render(
                [turn.message for turn in turns],
                self.special,
                tools=tools,
                add_generation_prompt=prompt,
                mark_answers=mark_answers,
                variables=self.variables,
            )
        except UserError as error:
            raise BadRow("the chat template rejects it", str(error)[:160].replace("\n", " ")) from None
        return text if self.placer is None else self.placer.write_places(text)

    def find_answers(self, text: str, turns: Sequence[Turn], tools: Any) -> dict[int, tuple[int, int]]:
        """Find the spans in the text of the turns that may be trained: answers, and messages with `loss: true`."""
        wanted = [number for number, turn in enumerate(turns) if turn.is_answer or turn.loss]
        if self.template.marks_answers and all(turns[number].is_answer for number in wanted):
            plain, blocks = text_spans.remove_marks(self._apply_template(turns, tools, mark_answers=True))
            if plain == text and len(blocks) == len(wanted):
                return dict(zip(wanted, blocks, strict=True))
        if (spans := self._find_all_spans(text, turns, wanted, tools)) is None:
            spans, last_end = {}, 0
            for number in wanted:
                spans[number] = self._find_span(text, turns, number, tools, last_end)
                last_end = spans[number][1]
        return spans

    def _find_all_spans(
        self, text: str, turns: Sequence[Turn], wanted: list[int], tools: Any
    ) -> dict[int, tuple[int, int]] | None:
        """Find all spans with one more rendering; None if the template does not write the answers verbatim."""
        replaced = list(turns)
        for number in wanted:
            replaced[number] = make_placeholder(turns[number], number)
        rest, position, spans = self._apply_template(replaced, tools), 0, dict[int, tuple[int, int]]()
        for number in wanted:
            before, placeholder, rest = rest.partition(PLACEHOLDER.format(number))
            if not placeholder or not text.startswith(before, position):
                return None
            start, position = self._find_start(before, turns, number) + position, position + len(before)
            after = rest.partition(PLACEHOLDER[:4])[0]
            spellings = list_spellings(turns[number])
            answer = next((spelling for spelling in spellings if text.startswith(spelling + after, position)), None)
            if answer is None:
                return None
            position += len(answer)
            spans[number] = (start, position)
        return spans if text[position:] == rest else None

    def _find_span(self, text: str, turns: Sequence[Turn], number: int, tools: Any, last_end: int) -> tuple[int, int]:
        """Find the span of one turn: the text that changes with a placeholder."""
        other = self._apply_template(
            [*turns[:number], make_placeholder(turns[number], number), *turns[number + 1 :]], tools
        )
        before, placeholder, after = other.partition(PLACEHOLDER.format(number))
        if not placeholder:
            raise BadRow("the chat template omits an answer", f"message {number + 1}")
        start = self._find_start(before, turns, number, last_end)
        if not text.startswith(before[:start]):
            start = text_spans.count_common_prefix(text, before)
        return start, max(start, len(text) - text_spans.count_common_prefix(text[::-1], after[::-1]))

    def _find_start(self, before: str, turns: Sequence[Turn], number: int, last_end: int = 0) -> int:
        """Find where the model's reply starts, in the text before the answer itself.

        Args:
            last_end: where in the text the previous answer ends.
        """
        if not turns[number].is_answer:
            return len(before)
        position = before.rfind(self.header, last_end) if self.header else -1
        previous = turns[number - 1].text.strip() if number else ""
        # a reply may continue after a tool result without another header
        if position >= 0 and not (previous and previous in before[position + len(self.header) :]):
            return position + len(self.header)
        return len(before) - (len(self.lead) if self.lead and before.endswith(self.lead) else 0)

    def _probe_template(self) -> tuple[str, str]:
        """Find the template's header of a reply, and its white space before an answer."""
        question = Turn({"role": "user", "content": "?"}, None, 1.0)
        answer = make_placeholder(Turn({"role": "assistant", "content": ""}, None, 1.0), 0)
        try:
            asked, prompt = self._apply_template([question], None), self._apply_template([question], None, prompt=True)
            before = self._apply_template([question, answer], None).partition(PLACEHOLDER.format(0))[0]
        except BadRow:
            return "", ""
        header = prompt.removeprefix(asked) if prompt.startswith(asked) else ""
        lead = before.removeprefix(asked) if before.startswith(asked) else ""
        return header, "" if header or lead.strip() else lead

    def _build_spans(self, text: str, turns: Sequence[Turn], answers: dict[int, tuple[int, int]]) -> list[Span]:
        """Build the weighted spans: the whole text if everything is trained, then the spans with other weights."""
        last = max((number for number in answers if turns[number].is_answer), default=-1)
        spans = [Span(0, len(text), 1.0)] if self.loss_mask.on == "everything" else []
        for number, (start, stop) in answers.items():
            turn, turn_end = turns[number], stop
            if turn.is_answer:
                stop, turn_end = self._find_ends(text, start, stop)
            if not self._is_trained(number, turns):
                spans.append(Span(start, turn_end, 0.0))
                continue
            rules = self.loss_mask.weights if turn.is_answer else ()
            if self.loss_mask.end_of_turn == "turn" or (self.loss_mask.end_of_turn == "last" and number == last):
                stop = turn_end
            parts = split_by_weight(text[start:stop], rules)
            spans += [Span(start + low, start + high, weight * turn.weight) for low, high, weight in parts]
            spans.append(Span(stop, turn_end, 0.0))
        return spans

    def _find_ends(self, text: str, start: int, stop: int) -> tuple[int, int]:
        """Find the ends of an answer without and with the end-of-turn token, which may be inside or after it."""
        if match := self.end.match(text, stop):
            return stop, match.end()
        inside = [match for match in self.end.finditer(text, start, stop) if not text[match.end() : stop].strip()]
        return (inside[-1].start(), stop) if inside else (stop, stop)

    def _is_trained(self, number: int, turns: Sequence[Turn]) -> bool:
        turn = turns[number]
        if turn.loss is not None:
            return turn.loss
        if self.loss_mask.on == "last_answer":
            questions = [index for index, other in enumerate(turns) if other.message["role"] in ("user", "tool")]
            return number > max(questions, default=-1)
        return turn.is_answer
