"""Which columns of a table to ask for, and which to state in the question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from estiba.errors import ConfigError, DataError
from finetune.data.dependencies import ColumnProfile, Dependencies, measure, profile, sample_rows
from finetune.data.recognise import LABELS, column_named, normalized
from finetune.data.settings import DataSettings

MAX_QUESTIONS = 6
"""More questions would spend the training on the columns that are cheapest to look up."""
_MAX_KEYS = 8
_MAX_MEASURED = 100
"""The columns of a wider table are not all compared with each other."""
_PREDICTED = 0.5
_MANY_VALUES = 0.05
_LONG_CHARS = 200
_TOLD_APART = 0.95
"""The smallest share of the rows that keys without a serial number tell apart."""


@dataclass(frozen=True, kw_only=True)
class ColumnRoles:
    """The part that each column plays."""

    keys: list[str]
    targets: list[str]
    memorisation: list[str] = field(default_factory=list)
    """Targets that no other column predicts."""
    constant: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    decided_by: dict[str, str] = field(default_factory=dict)
    predictability: dict[str, float] = field(default_factory=dict)
    """Target -> share of rows whose answer the best other column gives."""
    warnings: list[str] = field(default_factory=list)


def choose_columns(where: str, columns: Mapping[str, Sequence[str]], settings: DataSettings) -> ColumnRoles:
    """Return each column's role. Raises ConfigError for a setting that names no column, DataError if none can be asked.

    Targets are the columns that another one decides, and numbers that none predicts. Keys are the columns that decide
    them, and as few others as tell the rows apart.
    """
    distinct = _distinct_rows(columns)
    rows = [distinct[index] for index in sample_rows(len(distinct), len(columns), settings.seed)]
    sample = {name: [cells[row].strip() for row in rows] for name, cells in columns.items()}
    profiles = {name: profile(name, cells) for name, cells in sample.items()}
    constant = [name for name in columns if profiles[name].is_constant]
    useful = [name for name in columns if name not in constant]
    warnings: list[str] = []
    given_targets = _named(settings.target_columns, list(columns), "--target-columns")
    given_keys = _named(settings.key_columns, list(columns), "--key-columns")
    if both := set(given_targets) & set(given_keys):
        raise ConfigError(
            f"--target-columns and --key-columns both name {sorted(both)[0]!r}; a question states its keys"
        )
    if len(rows) == 1:
        useful = [name for name in columns if profiles[name].distinct]
        constant = [name for name in columns if name not in useful]
        warnings.append(f"{where}: has one row, or the same row each time; its last cell is asked for")
    elif len(useful) < 2 and len(filled := [name for name in columns if profiles[name].distinct]) > 1:
        useful, constant = filled, [name for name in columns if name not in filled]
        warnings.append(
            f"{where}: but for one column all rows are alike, so every answer is the same, and that is what is learnt"
        )
    if len(useful) < 2 and not (given_targets and (given_keys or len(columns) > 1)):
        found_columns = f"only the column {useful[0]!r} has" if useful else "no column has"
        raise DataError(
            f"{where}: {found_columns} more than one value, so there is nothing to ask; "
            "to train on a column's text give --text-column NAME, or --csv-delimiter if its cells are several"
        )
    if len(useful) > _MAX_MEASURED:
        named = {*given_targets, *given_keys}
        useful = sorted(useful, key=lambda name: name not in named)[:_MAX_MEASURED]
        warnings.append(
            f"{where}: has {len(columns):,} columns, of which {_MAX_MEASURED} are used; name them by settings"
        )
    found = measure({name: sample[name] for name in useful})
    classes = _equivalent(useful, profiles, found)
    decided = {name: by for name in useful if (by := _decider(name, useful, classes, profiles, found)) is not None}
    unpredicted = [name for name in useful if name not in decided and _is_memorisation(profiles[name], name, found)]
    targets = given_targets or _default_targets(useful, given_keys, decided, unpredicted, profiles)
    if not targets:
        targets = [_fallback_target([name for name in useful if name not in given_keys], profiles, unpredicted)]
        warnings.append(
            f"{where}: no column follows from the others, so the questions ask for {targets[0]!r}; "
            "set --target-columns to ask for others"
        )
    keys = given_keys or _default_keys(useful, targets, decided, unpredicted, profiles, sample)
    if not keys and not given_targets and len(targets) > 1:
        keys = [max(targets, key=lambda name: profiles[name].distinct)]
        targets = [name for name in targets if name not in keys]
    if not keys:
        raise DataError(f"{where}: no column is left to state in a question; give --key-columns, or fewer targets")
    predictability = {name: found.best(name, [k for k in useful if k in keys])[1] for name in targets if name in useful}
    memorisation = [
        name for name in targets if name in useful and name not in decided
        and (name in unpredicted or _is_memorisation(profiles[name], name, found))
    ]  # fmt: skip
    return ColumnRoles(
        keys=keys,
        targets=targets,
        memorisation=memorisation,
        constant=constant,
        ignored=[name for name in useful if name not in keys and name not in targets],
        decided_by={
            name: key for name, by in decided.items() if name in targets and (key := _stated(by, name, keys, found))
        },
        predictability={name: round(value, 4) for name, value in predictability.items()},
        warnings=warnings,
    )


def _distinct_rows(columns: Mapping[str, Sequence[str]]) -> list[int]:
    """The first of each row. A row that is there twice would make each of its cells decide all others."""
    first: dict[tuple[str, ...], int] = {}
    for index, row in enumerate(zip(*columns.values(), strict=True)):
        first.setdefault(row, index)
    return list(first.values())


def _named(names: Sequence[str] | None, columns: Sequence[str], setting: str) -> list[str]:
    return list(dict.fromkeys(column_named(name, columns, setting) for name in names or ()))


def _equivalent(useful: Sequence[str], profiles: dict[str, ColumnProfile], found: Dependencies) -> dict[str, str]:
    """Columns that decide each other -> the shortest of them, such as a name -> its code."""
    decides = {name: set(found.deciders(name)) for name in useful}
    result = {}
    for name in useful:
        alike = [name, *(other for other in useful if other in decides[name] and name in decides[other])]
        result[name] = min(alike, key=lambda column: (profiles[column].mean_chars, useful.index(column)))
    return result


def _decider(
    name: str, useful: Sequence[str], classes: dict[str, str], profiles: dict[str, ColumnProfile], found: Dependencies
) -> str | None:
    """The column that decides this one: the representative of its equals, or else the most general one."""
    if classes[name] != name:
        return classes[name]
    deciders = [other for other in found.deciders(name) if classes[other] == other and other != name]
    roots = [other for other in deciders if not set(found.deciders(other)) - {o for o in useful if classes[o] == other}]
    return min(roots or deciders, key=lambda other: (profiles[other].distinct, useful.index(other)), default=None)


def _stated(decider: str, name: str, keys: Sequence[str], found: Dependencies) -> str | None:
    """The key that decides a column: its decider, or another that does as well where keys were given."""
    if decider in keys:
        return decider
    deciders = [key for key in found.deciders(name) if key in keys]
    return found.best(name, deciders)[0] if deciders else None


def _is_memorisation(column: ColumnProfile, name: str, found: Dependencies) -> bool:
    """Whether a column holds numbers that nothing predicts. A serial number is a key."""
    _, best = found.best(name, found.names)
    many = column.distinct > 20 and (column.distinct_share > _MANY_VALUES or column.decimals_share > 0.3)
    return column.numbers_share > 0.6 and many and not column.is_serial and best < _PREDICTED


def _default_targets(
    useful: Sequence[str],
    given_keys: Sequence[str],
    decided: dict[str, str],
    unpredicted: Sequence[str],
    profiles: dict[str, ColumnProfile],
) -> list[str]:
    """The decided columns with the shortest answers, and then those to memorise, in the order of the table."""
    asked = [name for name in decided if name not in given_keys]
    asked += [name for name in useful if normalized(name) in LABELS and name not in decided and name not in given_keys]
    if not asked:
        return []
    asked = sorted(asked, key=lambda name: profiles[name].mean_chars)
    numbers = [name for name in unpredicted if name not in given_keys and name not in asked]
    numbers = numbers[: max(1, MAX_QUESTIONS - len(asked))]
    chosen = set(asked[: MAX_QUESTIONS - len(numbers)]) | set(numbers)
    return [name for name in useful if name in chosen]


def _fallback_target(columns: Sequence[str], profiles: dict[str, ColumnProfile], unpredicted: Sequence[str]) -> str:
    """The last column that is no long text and no serial number or name."""
    fitting = [
        name
        for name in columns
        if name in unpredicted or (profiles[name].mean_chars <= _LONG_CHARS and profiles[name].distinct_share < 0.95)
    ]
    return (fitting or list(columns))[-1]


def _default_keys(
    useful: Sequence[str],
    targets: Sequence[str],
    decided: dict[str, str],
    unpredicted: Sequence[str],
    profiles: dict[str, ColumnProfile],
    sample: Mapping[str, Sequence[str]],
) -> list[str]:
    """The deciders of the targets, then the columns that tell most rows apart; all others where nothing is decided.

    A serial number comes last, since it says nothing about its row; where rows are alike without it, it is a key too.
    """
    others = [name for name in useful if name not in targets]
    deciders = list(dict.fromkeys(decided[name] for name in targets if name in decided and decided[name] in others))
    if any(name not in decided and name not in unpredicted for name in targets):
        features = [name for name in others if not profiles[name].is_serial]
        alike = _distinct(sample, [*features, *targets]) < _TOLD_APART * len(next(iter(sample.values())))
        return others if alike or not features else features  # a label is judged by all features
    free = [name for name in others if name not in deciders and name not in decided and name not in unpredicted]
    keys = list(deciders)
    distinct = _distinct(sample, keys)
    while free and len(keys) < _MAX_KEYS:
        gains = {name: _distinct(sample, [*keys, name]) for name in free}
        fitting = [name for name in free if gains[name] > distinct]
        if not fitting:
            break
        best = max(
            fitting,
            key=lambda name: (not profiles[name].is_serial, (gains[name] - distinct) / (8 + profiles[name].mean_chars)),
        )
        keys.append(best)
        free.remove(best)
        distinct = gains[best]
    return [name for name in useful if name in keys]


def _distinct(sample: Mapping[str, Sequence[str]], names: Sequence[str]) -> int:
    return len(set(zip(*(sample[name] for name in names), strict=True))) if names else 1
