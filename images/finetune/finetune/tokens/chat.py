"""Conversations as text, with the spans that are trained.

The text is what the chat template renders, to the character, since that is what an application sends to the model
later. An assistant's span begins where the template's generation prompt ends and ends with the end-of-turn token.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from estiba.errors import ConfigError, DataError, first_line
from finetune.data.records import turns

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)
"""For base models, which have no template: it uses words and the end-of-sequence token, no new tokens."""
RAW_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
"""For base models that learn nothing but continuations of prompts: whoever asks sends the prompt as it is."""
_MARK = "\ue000{}\ue001"
"""Two private-use characters around a number: no template and no text has it."""


@dataclass(frozen=True)
class Rendered:
    """A text, and the [start, end) of what is trained."""

    text: str
    trained: tuple[tuple[int, int], ...]


class ChatRenderer:
    """Renders conversations by a tokenizer's chat template."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str | None, *, completions_only: bool = False
    ) -> None:
        """`template` is "plain", the path of a Jinja file, or None for the tokenizer's own.

        The tokenizer keeps the template, so that it is saved with the model. Where there is none, it gets the plain
        one, or with `completions_only` the raw one. Raises ConfigError if a file cannot be read.
        """
        # An application that renders a template adds no beginning of sequence, so the template has to.
        self._bos = "{{ bos_token }}" if adds_bos(tokenizer) else ""
        if template == "plain":
            tokenizer.chat_template = self._bos + PLAIN_TEMPLATE
        elif template is not None:
            try:
                tokenizer.chat_template = Path(template).read_text()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(
                    f"--chat-template {template}: cannot be read ({error}); pass a Jinja file, or plain"
                ) from None
        self.uses_plain = tokenizer.chat_template is None
        if self.uses_plain:
            tokenizer.chat_template = self._bos + (RAW_TEMPLATE if completions_only else PLAIN_TEMPLATE)
        if tokenizer.eos_token is None:
            raise ConfigError(
                "the tokenizer has no end-of-sequence token, so the model would never stop; choose another base model"
            )
        self._tokenizer = tokenizer
        self._ends = sorted({*tokenizer.all_special_tokens, *_added_specials(tokenizer)}, key=len, reverse=True)
        self._skeletons: dict[bool, list[str] | None] = {}
        self._takes_system = self._shows_system()

    def conversation(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> Rendered:
        """Render a conversation. Trained are the assistant's messages, except those of weight 0.

        Raises DataError if the template rejects it, or changes earlier turns when later ones are added.
        """
        plain = [{name: value for name, value in message.items() if name != "weight"} for message in messages]
        text = self._apply(plain, tools)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or message.get("weight", 1) == 0:
                continue
            prompt = self._apply(plain[:index], tools, add_generation_prompt=True)
            turn = self._apply(plain[: index + 1], tools)
            if not (text.startswith(prompt) and text.startswith(turn[: len(turn.rstrip())])):
                prompt_end, turn_end = self._find_by_mark(plain, index, tools, text)
            else:
                prompt_end, turn_end = len(prompt), len(turn)
            spans.append((prompt_end, self._end_of_turn(text, prompt_end, turn_end)))
        text, spans = self._terminated(text, spans)
        return Rendered(text, tuple(spans))

    def question(self, system: str | None, user: str, answer: str) -> Rendered:
        """Render one question with its answer; faster than `conversation`, by what the template puts between them."""
        skeleton = self._skeleton(system is not None)
        if skeleton is None:
            return self.conversation(turns(system, user, answer))
        contents = [user, answer] if system is None else [system, user, answer]
        text, start = skeleton[0], 0
        for content, after in zip(contents, skeleton[1:], strict=True):
            start = len(text)
            text += content + after
        spans = [(start, self._end_of_turn(text, start, len(text)))]
        text, spans = self._terminated(text, spans)
        return Rendered(text, tuple(spans))

    def prompt(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> str:
        """Render what the model is asked to continue."""
        return self._apply(list(messages), tools, add_generation_prompt=True)

    def completion(self, prompt: str, completion: str) -> Rendered:
        """Render a prompt and its continuation: as a conversation, or without a template just as they are."""
        if not self.uses_plain:
            return self.question(None, prompt, completion)
        prompt = self.completion_prompt(prompt)
        text = prompt + completion + str(self._tokenizer.eos_token)
        return Rendered(text, ((len(prompt), len(text)),))

    def completion_prompt(self, prompt: str) -> str:
        """Render what the model is asked to continue, as `completion` does."""
        if not self.uses_plain:
            return self.prompt([{"role": "user", "content": prompt}])
        return (str(self._tokenizer.bos_token) if self._bos else "") + prompt

    # --- internals

    def _shows_system(self) -> bool:
        """Return whether the template renders a system message. Some refuse one, some leave it out."""
        self._takes_system = True
        marked = turns(_MARK.format(0), _MARK.format(1))
        try:
            return _MARK.format(0) in self._apply(marked, (), add_generation_prompt=True)
        except DataError:
            return False

    def _apply(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], **options: Any) -> str:
        if not messages and not options.get("add_generation_prompt"):
            return ""
        own = copy.deepcopy(list(messages))
        if not self._takes_system:
            own = _without_system(own)
        try:
            text = self._tokenizer.apply_chat_template(own, tools=list(tools) or None, tokenize=False, **options)
        except Exception as error:  # a template is a program, and raises anything
            raise DataError(
                f"the chat template rejects the conversation ({first_line(error)}); correct the order of roles, or "
                "pass another --chat-template"
            ) from None
        assert isinstance(text, str)
        return text

    def _skeleton(self, has_system: bool) -> list[str] | None:
        """Return the template's text before, between and after the contents, or None if it changes contents."""
        if has_system not in self._skeletons:
            roles = ["system", "user", "assistant"] if has_system else ["user", "assistant"]
            marks = [_MARK.format(index) for index in range(len(roles))]
            text = self._apply([{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)], ())
            parts: list[str] | None = []
            for mark in marks:
                before, found, text = text.partition(mark)
                if not found or mark in text:
                    parts = None
                    break
                assert parts is not None
                parts.append(before)
            if parts is not None:
                parts.append(text)
                self._skeletons[has_system] = parts
                if not self._agrees(has_system):
                    parts = None
            self._skeletons[has_system] = parts
        return self._skeletons[has_system]

    def _agrees(self, has_system: bool) -> bool:
        """Compare with whole renderings of awkward contents: blanks at the ends, markup, an empty answer."""
        for user, answer in ((" a \n\nb ", " c\n"), ("<think>x</think> y", "1,000"), ("{{ a }}\n", "-")):
            system = " s " if has_system else None
            try:
                whole = self.conversation(turns(system, user, answer))
            except DataError:
                return False
            if self.question(system, user, answer) != whole:
                return False
        return True

    def _find_by_mark(
        self, messages: Sequence[dict[str, Any]], index: int, tools: Sequence[dict[str, Any]], text: str
    ) -> tuple[int, int]:
        """Find a turn that is rendered differently as the last one, by a mark before and after its content."""
        content = messages[index]["content"]
        marked = list(messages)
        marked[index] = {**messages[index], "content": _MARK.format(0) + content + _MARK.format(1)}
        rendered = self._apply(marked, tools)
        before, first, rest = rendered.partition(_MARK.format(0))
        inside, second, after = rest.partition(_MARK.format(1))
        if not (first and second and before + inside + after == text):
            raise DataError(
                "the chat template changes earlier turns when a later one is added, so what to train is not certain; "
                "split the conversation, or pass another --chat-template"
            )
        next_end = min((after.find(token) + len(token) for token in self._ends if token in after), default=0)
        return len(before), len(before) + len(inside) + next_end

    def _end_of_turn(self, text: str, start: int, end: int) -> int:
        """Return where the turn's last control token ends; what the template adds after it is not trained."""
        last = max(
            (text.rfind(token, start, end) + len(token) for token in self._ends if text.rfind(token, start, end) >= 0),
            default=0,
        )
        return last if last and not text[last:end].strip() else end

    def _terminated(self, text: str, spans: list[tuple[int, int]]) -> tuple[str, list[tuple[int, int]]]:
        """Add the end-of-sequence token where the template ends the last answer with no control token."""
        if not spans or text[spans[-1][1] :].strip():
            return text, spans
        start, end = spans[-1]
        if any(text.endswith(token, start, end) for token in self._ends):
            return text, spans
        end = start + len(text[start:end].rstrip())
        eos = str(self._tokenizer.eos_token)
        return text[:end] + eos, [*spans[:-1], (start, end + len(eos))]


def _without_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put the system message before the first user message, for templates that have no place for it."""
    if len(messages) < 2 or (messages[0]["role"], messages[1]["role"]) != ("system", "user"):
        return messages
    content = "\n\n".join(message["content"] for message in messages[:2] if message["content"])
    return [{**messages[1], "content": content}, *messages[2:]]


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _added_specials(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def separate_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    """Choose a padding token that is not the end of sequence, for whoever trains on with the saved tokenizer.

    With `pad == eos`, other trainers mask the end of sequence, and the model never stops. Nothing here pads.
    """
    if tokenizer.pad_token is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    taken = {tokenizer.eos_token, tokenizer.bos_token}
    free = [token for token in _added_specials(tokenizer) if token not in taken]
    preferred = [token for token in free if "pad" in token.lower()] or [
        token for token in free if "endoftext" in token or "unk" in token or "reserved" in token
    ]
    candidates = preferred or free
    tokenizer.pad_token = candidates[0] if candidates else None
