"""The template of a table's rows: Jinja in a sandbox, one made from the columns or a file of the user's.

A template has blocks: `known` (what a row's questions share), `question` and `answer` (once for each target column,
with `column` as its name), and `system`. A template without blocks is plain text, all of which is trained.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from estiba.errors import ConfigError

MAX_TEMPLATE_BYTES = 2**16
MAX_RENDERED_CHARS = 1_000_000
SYSTEM_LINE = "Answer with the value from the table."
_BLOCKS = frozenset({"system", "known", "question", "answer"})
_METHODS = frozenset(
    "capitalize count endswith find get isalpha isdigit items keys lower lstrip removeprefix removesuffix rstrip split "
    "splitlines startswith strip title upper values".split()
)
_FILTERS = frozenset(
    "abs capitalize default d escape first float int join last length list lower map reject rejectattr replace round "
    "select selectattr sort string title tojson trim truncate unique upper wordcount items".split()
)


class RowTemplate:
    """Renders rows. Raises ConfigError, which names the template, for what a template cannot do."""

    def __init__(self, name: str, source: str) -> None:
        self.name = name
        self.source = source
        try:
            self._template: Template = _environment().from_string(source)
        except TemplateError as error:
            raise self._error(error) from error
        self._columns: dict[str, None] = {}
        self._identifiers: list[str] = []
        self.blocks = frozenset(self._template.blocks)
        if unknown := self.blocks - _BLOCKS:
            raise ConfigError(
                f"{name}: unknown block {sorted(unknown)[0]!r}; the blocks are {', '.join(sorted(_BLOCKS))}"
            )
        if self.blocks and "known" not in self.blocks:
            raise ConfigError(
                f"{name}: has no block `known`; write {{% block known %}}...{{% endblock %}}, or no block"
            )

    @property
    def is_text(self) -> bool:
        """Whether a row becomes plain text, without questions."""
        return not self.blocks

    def text(self, row: Mapping[str, str]) -> str:
        return self._render(row, self._template.root_render_func, {})

    def system(self, row: Mapping[str, str]) -> str | None:
        if "system" not in self.blocks:
            return None
        return self._block("system", row, {}) or None

    def known(self, row: Mapping[str, str]) -> str:
        return self._block("known", row, {})

    def question(self, row: Mapping[str, str], column: str) -> str:
        return self._block("question", row, {"column": column}) if "question" in self.blocks else f"{column}:"

    def answer(self, row: Mapping[str, str], column: str) -> str:
        return self._block("answer", row, {"column": column}) if "answer" in self.blocks else row[column]

    def _block(self, block: str, row: Mapping[str, str], extra: dict[str, str]) -> str:
        return self._render(row, self._template.blocks[block], extra)

    def _render(self, row: Mapping[str, str], render: Callable[..., Iterable[str]], extra: dict[str, str]) -> str:
        if self._columns != row.keys():
            self._columns = dict.fromkeys(row)
            self._identifiers = [name for name in row if name.isidentifier()]
        variables = {name: row[name] for name in self._identifiers} | {"row": row} | extra
        parts: list[str] = []
        size = 0
        try:
            for part in render(self._template.new_context(variables, shared=True)):
                parts.append(part)
                size += len(part)
                if size > MAX_RENDERED_CHARS:
                    raise ConfigError(f"{self.name}: makes more than {MAX_RENDERED_CHARS:,} characters of one row")
        except ConfigError:
            raise
        except Exception as error:  # a template can raise whatever its expressions raise
            raise self._error(error, row) from error
        return "".join(parts).strip()

    def _error(self, error: Exception, row: Mapping[str, str] | None = None) -> ConfigError:
        number = getattr(error, "lineno", None)
        line = f":{number}" if number else ""
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        columns = f"; the columns are {', '.join(row)[:200]}" if row and "undefined" in reason.lower() else ""
        columns = columns or (f"; the columns are {', '.join(row)[:200]}" if row and "no attribute" in reason else "")
        return ConfigError(f"{self.name}{line}: the template fails ({reason}){columns}; correct it")


class ColumnTemplate(RowTemplate):
    """The default template. Python renders it, as Jinja would, since a large table has a million questions."""

    def __init__(self, keys: Sequence[str], with_gaps: Iterable[str]) -> None:
        self._keys = [(key, re.sub(r"\s+", " ", key)) for key in keys]
        self._gaps = set(with_gaps)
        super().__init__("default template", self._jinja())

    def system(self, row: Mapping[str, str]) -> str:  # noqa: ARG002
        return SYSTEM_LINE

    def known(self, row: Mapping[str, str]) -> str:
        lines = [f"{shown}: {row[key]}" for key, shown in self._keys if row[key] or key not in self._gaps]
        return "\n".join(lines).strip()

    def question(self, row: Mapping[str, str], column: str) -> str:  # noqa: ARG002
        return f"{column}:"

    def answer(self, row: Mapping[str, str], column: str) -> str:
        return row[column]

    def _jinja(self) -> str:
        lines = []
        for key, shown in self._keys:
            cell = f"row[{json.dumps(key, ensure_ascii=False)}]"
            line = f"{_literal(shown)}: {{{{ {cell} }}}}\n"
            lines.append(f"{{% if {cell} %}}{line}{{% endif %}}" if key in self._gaps else line)
        known = "".join(lines).removesuffix("\n")
        return (
            f"{{% block system %}}{SYSTEM_LINE}{{% endblock %}}\n"
            f"{{% block known %}}{known}{{% endblock %}}\n"
            "{% block question %}{{ column }}:{% endblock %}\n"
            "{% block answer %}{{ row[column] }}{% endblock %}\n"
        )


def read_template(path: str) -> RowTemplate:
    """Return the template in a file. Raises ConfigError."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_TEMPLATE_BYTES + 1)
        source = data.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(
            f"--template {path}: cannot be read ({error.strerror or error}); give a Jinja file"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--template {path}: is not UTF-8 text; give a Jinja file") from error
    if len(data) > MAX_TEMPLATE_BYTES:
        raise ConfigError(f"--template {path}: is larger than {MAX_TEMPLATE_BYTES // 1024} KiB; shorten it")
    if not source.strip():
        raise ConfigError(f"--template {path}: is empty; write {{{{ COLUMN }}}} or the blocks known, question, answer")
    return RowTemplate(path, source.replace("\r\n", "\n"))


def _literal(text: str) -> str:
    """Text that Jinja leaves as it is."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if "{" in text or "#" in text else text


class _Environment(ImmutableSandboxedEnvironment):
    """A sandbox that also keeps a template from using up memory or time."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator != "*" or not all(isinstance(value, (int, float)) for value in (left, right)):
            raise SecurityError(f"the operator {operator} is not allowed here")
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> None:
        """Leave `format` to `is_safe_attribute`: the width of a format can be anything."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return (attr in _METHODS or not callable(value)) and super().is_safe_attribute(obj, attr, value)


def _environment() -> _Environment:
    environment = _Environment(undefined=StrictUndefined, keep_trailing_newline=True, loader=None)
    environment.globals.clear()
    environment.filters = {name: value for name, value in environment.filters.items() if name in _FILTERS}
    return environment
