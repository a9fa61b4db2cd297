"""A conversation as tokens and their weights in the loss: written once, tokenized once, trained where it answers."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from litgpt.data.read.conversation import Conversation, Message
from litgpt.data.read.fields import BadRow
from litgpt.data.render.chat_template import ChatTemplate
from litgpt.data.render.loss_weights import WeightRule, split_by_weight
from litgpt.data.render.spans import (
    Span,
    compute_token_weights,
    count_common_prefix,
    disable_offset_trimming,
    remove_marks,
)
from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError

TrainOn = Literal["answers", "last_answer", "everything"]
EndOfTurn = Literal["turn", "last", "none"]

PLACEHOLDER = "\U000f8a33stand-in-{}\U000f8a34"
"""What takes the place of an answer to find where a template puts it."""


@dataclass(frozen=True)
class Example:
    """One sample.

    Attributes:
        ids: (T,) int32 tokens.
        weights: (T,) float32, what the loss of each token is multiplied by; 0 for a token that is not trained.
        channel: the group that its loss is reported in.
    """

    ids: np.ndarray
    weights: np.ndarray
    channel: str | None = None


@dataclass(frozen=True)
class LossMask:
    """What of a conversation is trained, unless its messages say otherwise.

    Attributes:
        on: all answers, those after the last question, or every token.
        end_of_turn: whether the token that ends an answer is trained: after every answer, the last one, or none.
        weights: what the loss is multiplied by where an answer matches a pattern.
    """

    on: TrainOn = "answers"
    end_of_turn: EndOfTurn = "turn"
    weights: tuple[WeightRule, ...] = ()

    def __str__(self) -> str:
        # caches on disk are keyed by this text, so it keeps the class's first name
        return f"Trained(on={self.on!r}, end_of_turn={self.end_of_turn!r}, weights={self.weights!r})"


@dataclass
class Turn:
    """A message as templates read it."""

    message: dict[str, Any]
    loss: bool | None
    weight: float
    said: str = field(default="")

    @property
    def answers(self) -> bool:
        """Whether the model writes it."""
        return self.message["role"] == "assistant"


def build_turns(conversation: Conversation) -> list[Turn]:
    """Messages as templates read them: tool calls in one row go to one assistant's turn, with the text before them."""
    turns: list[Turn] = []
    if conversation.system is not None:
        turns.append(Turn({"role": "system", "content": conversation.system}, None, 1.0))
    previous: Message | None = None
    for message in conversation.messages:
        if message.role != "tool_call":
            turns.append(build_turn(message))
        else:
            if previous is None or previous.role not in ("assistant", "tool_call"):
                turns.append(Turn({"role": "assistant", "content": ""}, message.loss, message.weight))
            function = json.loads(message.content)
            call = {"name": function["name"], "arguments": function.get("arguments") or {}}
            turns[-1].message.setdefault("tool_calls", []).append({"type": "function", "function": call})
        previous = message
    return turns


def build_turn(message: Message) -> Turn:
    """A message without tool calls as templates read it."""
    content = {
        "role": message.role,
        "content": f"{message.content}\n{message.context}" if message.context else message.content,
    }
    if message.reasoning:
        content["reasoning_content"] = message.reasoning
    return Turn(content, message.loss, message.weight, content["content"])


class ChatRenderer:
    """Writes conversations by a model's chat template and says which tokens of them are trained.

    An answer begins behind what the template puts before the model's reply and ends before what comes next. Where the
    template marks answers by `{% generation %}`, that is taken; else another text is put in the answer's place, and
    what stays the same before and behind it is not the answer. That also holds for templates that write an answer in
    the middle of a conversation otherwise than the last one, such as without its reasoning.

    Args:
        tokenizer: must be a tokenizer.json, which tells where in the text each token is.
        template: of the model.
        trained: what is trained.
        variables: more that the template is told, such as `enable_thinking`.

    Raises:
        UserError: for another kind of tokenizer.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        trained: LossMask | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        if tokenizer.backend != "huggingface":
            raise UserError(f"{tokenizer.folder}: chat templates need a tokenizer.json here; or set data.prompt_style")
        self.tokenizer, self.template, self.trained = tokenizer, template, trained or LossMask()
        self.variables, self.special = dict(variables or {}), tokenizer.special_tokens()
        self.processor = disable_offset_trimming(tokenizer.processor)
        self.added = [token.content for token in tokenizer.processor.get_added_tokens_decoder().values()]
        self.header, self.lead, ends = self._probe_template()
        found = sorted({*ends, *self._list_stop_tokens()}, key=len, reverse=True)
        self.end = re.compile(rf"\s*(?:{'|'.join(map(re.escape, found)) or '(?!)'})")

    @property
    def weighs(self) -> bool:
        """Whether it gives parts of an answer weights of their own."""
        return bool(self.trained.weights)

    def fingerprint_parts(self) -> list[Any]:
        """All that decides what becomes of a conversation."""
        return [self.tokenizer.fingerprint(), self.special, self.template.sources, self.variables, str(self.trained)]

    def examples(self, conversations: Sequence[Conversation]) -> list[Example | BadRow]:
        """Each conversation as tokens, or what is wrong with it; the texts are tokenized in parallel."""
        written = [self._try_render(conversation) for conversation in conversations]
        texts = [one[0] for one in written if not isinstance(one, BadRow)]
        encodings = iter(self.processor.encode_batch(texts, add_special_tokens=False))
        return [
            one if isinstance(one, BadRow) else self._example(one[1], next(encodings), conversation)
            for one, conversation in zip(written, conversations, strict=True)
        ]

    def question(self, conversation: Conversation) -> list[int]:
        """The tokens of what comes before the first answer, with the header that asks for it; none of a text."""
        if conversation.is_text:
            return []
        turns = build_turns(conversation)
        first = next((number for number, turn in enumerate(turns) if turn.answers), len(turns))
        tools = json.loads(conversation.tools) if conversation.tools else None
        text = self._render(turns[:first], tools, prompt=True) if first else ""
        return list(self.processor.encode(text, add_special_tokens=False).ids)

    def _example(self, parts: list[Span], encoding: Any, conversation: Conversation) -> Example:
        weights = compute_token_weights(parts, np.array(encoding.offsets, np.int64).reshape(-1, 2))
        ids = np.array(encoding.ids, np.int32)
        if conversation.is_text:
            return self._frame_text(ids, conversation)
        return Example(ids, weights * np.float32(conversation.weight), conversation.channel)

    def _frame_text(self, ids: np.ndarray, conversation: Conversation) -> Example:
        """Plain text between the tokens that begin and end one, all of it trained."""
        ids = self.tokenizer.frame(ids, eos=self.tokenizer.eos_id is not None)
        (message,) = conversation.messages
        weight = conversation.weight * message.weight * (message.loss is not False)
        return Example(ids, np.full(len(ids), weight, np.float32), conversation.channel)

    def _try_render(self, conversation: Conversation) -> "tuple[str, list[Span]] | BadRow":
        try:
            return self.write(conversation)
        except BadRow as fault:
            return fault

    def write(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """The text of a conversation, and the parts of it that are trained, in order.

        Raises:
            BadRow: if the template refuses the conversation, or leaves an answer out.
        """
        if conversation.is_text:
            return conversation.messages[0].content, []
        turns, tools = build_turns(conversation), json.loads(conversation.tools) if conversation.tools else None
        text = self._render(turns, tools)
        self._check_complete(text, turns, tools)
        return text, self._build_spans(text, turns, self.spans(text, turns, tools))

    def _check_complete(self, text: str, turns: list[Turn], tools: Any) -> None:
        """Refuse a text that lacks the system's text, tools or calls: templates that cannot write them say nothing."""
        if tools and self._same_without(text, turns, None):
            raise BadRow("the chat template leaves tools out", "set data.tool_format: hermes")
        for number, turn in enumerate(turns):
            if "tool_calls" in turn.message:
                rest = {key: value for key, value in turn.message.items() if key != "tool_calls"}
                other = [*turns[:number], replace(turn, message=rest), *turns[number + 1 :]]
                if self._same_without(text, other, tools):
                    raise BadRow("the chat template leaves tool calls out", "set data.tool_format: hermes")
            if turn.message["role"] == "system" and turn.message["content"].strip() not in text:
                raise BadRow("the chat template leaves the system text out", turn.message["content"][:40])

    def _same_without(self, text: str, turns: Sequence[Turn], tools: Any) -> bool:
        try:
            return self._render(turns, tools) == text
        except BadRow:
            return False

    def _render(self, turns: Sequence[Turn], tools: Any, *, marked: bool = False, prompt: bool = False) -> str:
        try:
            return self.template.render(
                [turn.message for turn in turns],
                self.special,
                tools=tools,
                add_generation_prompt=prompt,
                marked=marked,
                variables=self.variables,
            )
        except UserError as error:
            raise BadRow("the chat template refuses it", str(error)[:160].replace("\n", " ")) from None

    def spans(self, text: str, turns: Sequence[Turn], tools: Any) -> dict[int, tuple[int, int]]:
        """Where in the text each turn stands that may be trained: answers, and what says `loss: true`."""
        wanted = [number for number, turn in enumerate(turns) if turn.answers or turn.loss]
        if self.template.marks_answers and all(turns[number].answers for number in wanted):
            plain, blocks = remove_marks(self._render(turns, tools, marked=True))
            if plain == text and len(blocks) == len(wanted):
                return dict(zip(wanted, blocks, strict=True))
        if (found := self._find_all_spans(text, turns, wanted, tools)) is None:
            found, behind = {}, 0
            for number in wanted:
                found[number] = self._find_span(text, turns, number, tools, behind)
                behind = found[number][1]
        return found

    def _find_all_spans(
        self, text: str, turns: Sequence[Turn], wanted: list[int], tools: Any
    ) -> dict[int, tuple[int, int]] | None:
        """The spans where the template writes answers as they are, from one more rendering; None where it does not."""
        stood_in = list(turns)
        for number in wanted:
            stood_in[number] = make_placeholder(turns[number], number)
        rest, place, found = self._render(stood_in, tools), 0, dict[int, tuple[int, int]]()
        for number in wanted:
            before, mark, rest = rest.partition(PLACEHOLDER.format(number))
            if not mark or not text.startswith(before, place):
                return None
            start, place = self._find_start(before, turns, number) + place, place + len(before)
            behind = rest.partition(PLACEHOLDER[:4])[0]
            said = next((one for one in list_spellings(turns[number]) if text.startswith(one + behind, place)), None)
            if said is None:
                return None
            place += len(said)
            found[number] = (start, place)
        return found if text[place:] == rest else None

    def _find_span(
        self, text: str, turns: Sequence[Turn], number: int, tools: Any, behind_last: int
    ) -> tuple[int, int]:
        """The span of one turn: what is not the same when another text stands in its place."""
        other = self._render([*turns[:number], make_placeholder(turns[number], number), *turns[number + 1 :]], tools)
        before, mark, behind = other.partition(PLACEHOLDER.format(number))
        if not mark:
            raise BadRow("the chat template leaves an answer out", f"message {number + 1}")
        start = self._find_start(before, turns, number, behind_last)
        if not text.startswith(before[:start]):
            start = count_common_prefix(text, before)
        return start, max(start, len(text) - count_common_prefix(text[::-1], behind[::-1]))

    def _find_start(self, before: str, turns: Sequence[Turn], number: int, behind_last: int = 0) -> int:
        """Where the model begins to write, in a text that ends where the answer itself begins.

        Args:
            behind_last: where in the text the answer before ends.
        """
        if not turns[number].answers:
            return len(before)
        place = before.rfind(self.header, behind_last) if self.header else -1
        said = turns[number - 1].said.strip() if number else ""
        # a reply may go on after a tool's result without another header
        if place >= 0 and not (said and said in before[place + len(self.header) :]):
            return place + len(self.header)
        return len(before) - (len(self.lead) if self.lead and before.endswith(self.lead) else 0)

    def _probe_template(self) -> tuple[str, str, list[str]]:
        """What the template puts before a reply, the blanks it begins a reply with, and the token it ends one with."""
        question = Turn({"role": "user", "content": "?"}, None, 1.0)
        answer = make_placeholder(Turn({"role": "assistant", "content": ""}, None, 1.0), 0)
        try:
            asked, prompt = self._render([question], None), self._render([question], None, prompt=True)
            before, _, behind = self._render([question, answer], None).partition(PLACEHOLDER.format(0))
        except BadRow:
            return "", "", []
        header = prompt.removeprefix(asked) if prompt.startswith(asked) else ""
        lead = before.removeprefix(asked) if before.startswith(asked) else ""
        found = re.match(rf"\s*({'|'.join(map(re.escape, self.added)) or '(?!)'})", behind)
        return header, "" if header or lead.strip() else lead, [found[1]] if found else []

    def _list_stop_tokens(self) -> list[str]:
        texts = [self.tokenizer.processor.id_to_token(number) for number in self.tokenizer.stop_ids]
        return [text for text in texts if text in self.added]

    def _build_spans(self, text: str, turns: Sequence[Turn], spans: dict[int, tuple[int, int]]) -> list[Span]:
        """The whole text if all of it is trained, and then the parts with weights of their own."""
        last = max((number for number in spans if turns[number].answers), default=-1)
        parts = [Span(0, len(text), 1.0)] if self.trained.on == "everything" else []
        for number, (start, stop) in spans.items():
            turn, ended = turns[number], stop
            if turn.answers:
                stop, ended = self._find_ends(text, start, stop)
            if not self._is_trained(number, turns):
                parts.append(Span(start, ended, 0.0))
                continue
            rules = self.trained.weights if turn.answers else ()
            if self.trained.end_of_turn == "turn" or (self.trained.end_of_turn == "last" and number == last):
                stop = ended
            inner = split_by_weight(text[start:stop], rules)
            parts += [Span(start + low, start + high, weight * turn.weight) for low, high, weight in inner]
            parts.append(Span(stop, ended, 0.0))
        return parts

    def _find_ends(self, text: str, start: int, stop: int) -> tuple[int, int]:
        """Where an answer ends without and with the token that ends a turn, which may stand inside it or behind it."""
        if found := self.end.match(text, stop):
            return stop, found.end()
        inside = [found for found in self.end.finditer(text, start, stop) if not text[found.end() : stop].strip()]
        return (inside[-1].start(), stop) if inside else (stop, stop)

    def _is_trained(self, number: int, turns: Sequence[Turn]) -> bool:
        turn = turns[number]
        if turn.loss is not None:
            return turn.loss
        if self.trained.on == "last_answer":
            asked = [place for place, other in enumerate(turns) if other.message["role"] in ("user", "tool")]
            return number > max(asked, default=-1)
        return turn.answers


def make_placeholder(turn: Turn, number: int) -> Turn:
    """A turn of the same role that says nothing but where it stands."""
    return replace(turn, message={"role": turn.message["role"], "content": PLACEHOLDER.format(number)})


def list_spellings(turn: Turn) -> list[str]:
    """The ways in which templates write a plain text: as it is, or without the blanks around it."""
    if "tool_calls" in turn.message or "reasoning_content" in turn.message:
        return []
    return [turn.said, turn.said.strip(), turn.said.strip("\n"), turn.said.rstrip(), turn.said.lstrip()]
