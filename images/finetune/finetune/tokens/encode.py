"""Text with trained spans to tokens.

Each span is tokenized apart from what precedes it: an application's prompt ends there, and a token that merges across
the border would never occur at inference.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from estiba.errors import DataError
from finetune.data.records import Question, Record
from finetune.tokens.chat import ChatRenderer, Rendered, adds_bos
from finetune.tokens.examples import NO_COLUMN, Example, TokenSequence, join

MIN_PROMPT_TOKENS = 32
"""A shortened text keeps at least this many tokens."""
_BORDER = "\n"
"""What is put before a text that continues another, and taken away again as tokens: it merges with nothing."""
_GUARD = "\ue002"
"""A private-use character, put into control tokens that the data spells: template and tokenizer see only text."""


class Encoder:
    """Records to examples. One per process."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        renderer: ChatRenderer,
        *,
        max_length: int,
        columns: Sequence[str] = (),
        share_trunks: bool = True,
    ) -> None:
        """`columns` numbers the target columns of tables, from 1."""
        self.tokenizer, self.renderer = tokenizer, renderer
        self.max_length, self.share_trunks = max_length, share_trunks
        self._columns = {name: number for number, name in enumerate(columns, start=1)}
        specials = sorted(
            (token.content for token in tokenizer.added_tokens_decoder.values() if token.special), key=len
        )
        spellings = "|".join(re.escape(special) for special in reversed(specials))
        self._control_ids = [number for number, token in tokenizer.added_tokens_decoder.items() if token.special]
        self._specials = re.compile(spellings or r"(?!)")
        self._guarded = re.compile("|".join(re.escape(_guard(special)) for special in reversed(specials)) or r"(?!)")
        self._adds_blank = _first_token(tokenizer, "a").startswith("▁")
        self._border: list[int] = tokenizer(_BORDER, add_special_tokens=False)["input_ids"]
        self._head = [int(tokenizer.bos_token_id)] if adds_bos(tokenizer) else []  # type: ignore[arg-type]
        """What the tokenizer puts before a text of its own accord."""

    def examples(self, record: Record) -> list[Example]:
        """Return the record's examples: one, or for a long text one per window.

        Raises DataError if an answer does not fit into `max_length`, or nothing is trained.
        """
        if record.kind == "text":
            return self._windows(record.text)
        if record.kind == "row":
            sequences = [
                self._fit(
                    self._tokens(self._row(record, question)),
                    self._columns.get(question.column, 0),
                )
                for question in record.questions
            ]
            return [join(sequences, share_trunk=self.share_trunks)]
        if record.kind == "completion":
            rendered = self.renderer.completion(self.guarded(record.prompt), self.guarded(record.completion))
        else:
            rendered = self._conversation(record)
        return [join([self._fit(self._tokens(rendered), NO_COLUMN)])]

    def prompt(self, text: str) -> list[int]:
        """Tokenize a rendered prompt as training does."""
        return self._plain(text, is_control=True)

    def end_tokens(self, examples: Sequence[Example]) -> list[int]:
        """Return the control tokens that trained sequences end with."""
        last = {int(example.ids[end - 1]) for example in examples for end in example.ends[1:]}
        return sorted(last & set(self._control_ids))

    # --- internals

    def guarded(self, text: str) -> str:
        """Return `text` with the spellings of control tokens marked as text."""
        return self._specials.sub(lambda match: _guard(match[0]), text)

    def guarded_all(self, value: Any) -> Any:
        """Return messages or tools with every text in them guarded: arguments of tool calls are data too."""
        if isinstance(value, str):
            return self.guarded(value)
        if isinstance(value, Mapping):
            return {name: self.guarded_all(item) for name, item in value.items()}
        return [self.guarded_all(item) for item in value] if isinstance(value, list | tuple) else value

    def _row(self, record: Record, question: Question) -> Rendered:
        system = None if record.system is None else self.guarded(record.system)
        user = self.guarded(record.user_message(question))
        return self.renderer.question(system, user, self.guarded(question.answer))

    def _conversation(self, record: Record) -> Rendered:
        return self.renderer.conversation(self.guarded_all(record.messages), self.guarded_all(record.tools))

    def _windows(self, text: str) -> list[Example]:
        """A text and its end; one that is too long becomes several windows, all of it trained."""
        ids = [*self._head, *self._plain(text, is_control=False), self.tokenizer.eos_token_id]
        if len(ids) < 2:
            raise DataError("the text is empty")
        found = []
        for start in range(0, len(ids) - 1, self.max_length):
            window = np.asarray(ids[start : start + self.max_length], dtype=np.int32)
            trained = np.ones(len(window), dtype=bool)
            trained[0] = False
            found.append(join([TokenSequence(ids=window, trained=trained)]))
        return [example for example in found if example.trained_tokens]

    def _tokens(self, rendered: Rendered) -> TokenSequence:
        ids: list[int] = []
        trained: list[bool] = []
        position = 0
        for start, end in rendered.trained:
            for piece, is_trained in ((rendered.text[position:start], False), (rendered.text[start:end], True)):
                tokens = self._plain(piece, is_control=True, follows=bool(ids))
                ids += tokens
                trained += [is_trained] * len(tokens)
            position = end
        # What the template adds after the last answer is never seen by the loss; it would only cost time.
        if trained and trained[0]:
            raise DataError("the record begins with its answer, so there is nothing to predict its first token from")
        return TokenSequence(ids=np.asarray(ids, dtype=np.int32), trained=np.asarray(trained, dtype=bool))

    def _plain(self, text: str, *, is_control: bool, follows: bool = False) -> list[int]:
        """Tokenize one piece. `is_control` False reads control tokens as text; guarded ones are text always."""
        ids: list[int] = []
        position = 0
        for match in [*self._guarded.finditer(text), None]:
            piece = text[position : match.start() if match else len(text)]
            ids += self._encode(piece, not is_control, follows or bool(ids))
            if match:
                ids += self._encode(match[0].replace(_GUARD, ""), True, follows or bool(ids))
                position = match.end()
        return ids

    def _encode(self, text: str, is_text: bool, follows: bool) -> list[int]:
        if not text:
            return []
        options = {"split_special_tokens": True} if is_text else {}
        if follows and self._adds_blank:
            # SentencePiece puts a blank before a text, which is wrong where the text continues another.
            continued: list[int] = self.tokenizer(_BORDER + text, add_special_tokens=False, **options)["input_ids"]
            if continued[: len(self._border)] == self._border:
                return continued[len(self._border) :]
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, **options)["input_ids"]
        return ids

    def _fit(self, sequence: TokenSequence, column: int) -> TokenSequence:
        """Shorten the longest untrained text in its middle until the sequence fits.

        Answers and control tokens are never cut. A record whose text would lose nearly everything is left out.
        """
        ids, trained = sequence.ids, sequence.trained
        if not trained.any():
            raise DataError("nothing in the record is trained: its answer is empty")
        excess = len(ids) - self.max_length
        if excess > 0:
            start, end = _longest_run(~trained & ~np.isin(ids, self._control_ids))
            kept = end - start - excess
            if kept < MIN_PROMPT_TOKENS:
                raise DataError(f"its answer does not fit into --max-sequence-length {self.max_length} with its prompt")
            cut = start + kept // 2
            ids, trained = (np.concatenate((both[:cut], both[cut + excess :])) for both in (ids, trained))
        return TokenSequence(ids=ids, trained=trained, column=column, is_truncated=excess > 0)


def _longest_run(flags: np.ndarray) -> tuple[int, int]:
    edges = np.flatnonzero(np.diff(np.concatenate(([0], flags.astype(np.int8), [0]))))
    starts, ends = edges[::2], edges[1::2]
    if not len(starts):
        return 0, 0
    longest = int((ends - starts).argmax())
    return int(starts[longest]), int(ends[longest])


def _guard(special: str) -> str:
    return special[:1] + _GUARD + special[1:]


def _first_token(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    return str(tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"][:1])[0])
