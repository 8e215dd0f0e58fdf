"""What the data front end gives to the trainer: records on both sides of a split, and a report on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from finetune.data.report import DataReport


def turns(system: str | None, user: str, answer: str | None = None) -> list[dict[str, Any]]:
    """Return the messages of one question, with its answer if it is given."""
    contents = {"system": system, "user": user, "assistant": answer}
    return [{"role": role, "content": content} for role, content in contents.items() if content is not None]


RecordKind = Literal["chat", "completion", "text", "row"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One question about a row of a table."""

    text: str
    """The last part of the user's message, such as "Units:"."""
    answer: str
    column: str
    """The target column, for metrics per column."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One training record. Which fields are filled depends on `kind`."""

    source: str
    """File and line, both as a user counts them: "survey.csv:17"."""
    group: str
    """Records of one group stay on one side of the split."""
    kind: RecordKind
    messages: tuple[dict[str, Any], ...] = ()
    """chat: role, content (a str), and where given tool_calls, tool_call_id, name, weight (0 or 1)."""
    tools: tuple[dict[str, Any], ...] = ()
    """chat: the JSON schemas of the tools."""
    prompt: str = ""
    """completion: what comes before the answer; not trained."""
    completion: str = ""
    """completion: the answer."""
    text: str = ""
    """text: all of it is trained."""
    system: str | None = None
    """row: the system message."""
    known: str = ""
    """row: what the questions share. A user's message is `known`, a line feed, and the question."""
    questions: tuple[Question, ...] = ()

    def as_json(self) -> list[dict[str, Any]]:
        """Return the record as lines of JSON: one, or for a row one per question."""
        if self.kind == "chat":
            return [{"messages": list(self.messages)} | ({"tools": list(self.tools)} if self.tools else {})]
        if self.kind == "completion":
            return [{"prompt": self.prompt, "completion": self.completion}]
        if self.kind == "text":
            return [{"text": self.text}]
        asked = [(self.user_message(question), question.answer) for question in self.questions]
        return [{"messages": turns(self.system, user, answer)} for user, answer in asked]

    def user_message(self, question: Question) -> str:
        return f"{self.known}\n{question.text}" if self.known else question.text


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """All records of a run."""

    train: list[Record]
    validation: list[Record]
    report: DataReport
    identity: str
    """Digest of the files' content and of the settings that change the records, for the run fingerprint."""

    def __iter__(self) -> Iterator[Record]:
        yield from self.train
        yield from self.validation
