"""Checks of a table of examples before anything is trained: a pandera schema, and errors that name rows."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wg_blocks.examples import HELD_OUT, SPLITS, TRAIN, Examples, near_equal, same_key
from wg_core.errors import ConfigError
from wg_core.structure.ids import ID_PATTERN

LONGEST_ANSWER = 20_000
LONGEST_MESSAGES = 200_000
LEAST_SCRIPT = 0.5
"""Share of an answer's letters in the script that most answers are written in (structure counts as Latin letters)."""

_COLUMNS = ("world_id", "step", "stage", "path", "messages", "answer", "schema", "split")
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, and the rows in which it is wrong: `{row, place, value}`."""

    name: str
    says: str
    failures: list[dict[str, Any]]

    @property
    def passed(self) -> bool:
        """Whether no row is wrong."""
        return not self.failures


def checks(examples: Examples) -> list[Check]:
    """Everything that is looked at in a table, passed or not."""
    rows = examples.rows
    by_column = _schema_failures(rows)
    found = [Check(name, says, by_column.pop(name, [])) for name, says in SAYS.items()]
    return [*found, *(Check(name, "the table's form", failures) for name, failures in sorted(by_column.items()))]


def must_suffice(examples: Examples, least: int, more: str = "") -> None:
    """Raises: ConfigError for fewer than `least` rows to train on or none held out, with `more`, the way to more."""
    counts = {name: len(examples.split(name)) for name in SPLITS}
    if counts[TRAIN] < least or not counts[HELD_OUT]:
        raise ConfigError(
            f"too few examples: {counts[TRAIN]} to train on and {counts[HELD_OUT]} held out, but at least {least} and 1 "
            f"are needed{'; ' + more if more else ''}"
        )


def must_pass(found: Sequence[Check]) -> None:
    """Raises: ConfigError where a check failed, with the rows that are wrong."""
    wrong = [check for check in found if not check.passed]
    if wrong:
        raise ConfigError("these examples cannot train a model:\n" + "\n".join(map(in_words, wrong)))


def in_words(check: Check, most: int = 5) -> str:
    """A check that failed, with its first rows."""
    shown = "; ".join(f"{f['place']}: {str(f['value'])[:80]!r}" for f in check.failures[:most])
    rest = len(check.failures) - most
    return f"- {check.name} ({check.says}): {shown}{f'; and {rest} more' if rest > 0 else ''}"


SAYS = {
    "columns": "every row has all columns and no others",
    "ids": "world and stage are ids, and the path begins with the stage",
    "steps": "step is a whole number from 0",
    "splits": "split is train or held_out",
    "messages": "messages are a list of {role, content} with texts, the last not of the assistant",
    "answers": "an answer has text, of bounded length",
    "schemas": "a schema is an object or nothing",
    "script": "an answer is written in the script of the table, without control characters",
    "duplicates": "no row stands there twice",
    "leaking_steps": "a unit is held out as a whole",
    "leaking_texts": "no training answer is near-equal to a held-out one",
}


def _schema_failures(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    odd = [i for i, row in enumerate(rows) if set(row) != set(_COLUMNS)]
    if odd:
        keys = [f"columns {', '.join(sorted(map(str, set(rows[i]) ^ set(_COLUMNS))))}" for i in odd]
        return {"columns": [_failure(rows, i, key) for i, key in zip(odd, keys, strict=True)]}
    import pandas as pd
    import pandera.pandas as pa

    frame = pd.DataFrame([dict(row) for row in rows], columns=list(_COLUMNS)).astype(object)
    main = _main_script(rows)

    def each(name: str, column: str, test: Any) -> tuple[str, Any]:
        return column, pa.Check(test, element_wise=True, name=name, error=name)

    tests = [
        each("ids", "world_id", _is_id),
        each("ids", "stage", _is_id),
        each("steps", "step", lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 0),
        each("splits", "split", lambda v: v in SPLITS),
        each("messages", "messages", _messages_fit),
        each("answers", "answer", lambda v: isinstance(v, str) and 0 < len(v.strip()) <= LONGEST_ANSWER),
        each("schemas", "schema", lambda v: v is None or isinstance(v, dict)),
        each("script", "answer", lambda v: _script_fits(v, main)),
    ]
    columns = {c: pa.Column(object, [t for at, t in tests if at == c], nullable=c == "schema") for c in _COLUMNS}

    def whole(name: str, test: Callable[[Any], list[bool]]) -> Any:
        return pa.Check(lambda t: pd.Series(test(t), index=t.index, dtype=bool), name=name, error=name)

    table = [
        whole("ids", lambda t: [_path_fits(s, p) for s, p in zip(t["stage"], t["path"], strict=True)]),
        whole("duplicates", _not_repeated),
        whole("leaking_steps", _not_on_both_sides),
        whole("leaking_texts", _not_leaking),
    ]
    found: dict[str, list[dict[str, Any]]] = {}
    # columns first: what looks at the whole table can only read one whose cells are of the right kinds
    for schema in (pa.DataFrameSchema(columns), pa.DataFrameSchema(checks=table)):
        try:
            schema.validate(frame, lazy=True)
        except pa.errors.SchemaErrors as error:
            cases = error.failure_cases
            for name, index in sorted({(str(c), int(i)) for c, i in zip(cases["check"], cases["index"], strict=True)}):
                shown = rows[index]["step" if name == "leaking_steps" else _SHOWN.get(name, "answer")]
                found.setdefault(name, []).append(_failure(rows, index, shown))
            break
    return found


_SHOWN = {"ids": "path", "steps": "step", "splits": "split", "messages": "messages", "schemas": "schema"}


def _failure(rows: Sequence[Mapping[str, Any]], index: int, value: Any) -> dict[str, Any]:
    row = rows[index]
    return {"row": index, "place": f"row {index} (step {row.get('step')}, {row.get('path')})", "value": value}


def _is_id(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(ID_PATTERN, value) is not None


def _path_fits(stage: object, path: object) -> bool:
    return isinstance(path, str) and path.startswith(f"{stage}/")


def _messages_fit(value: object) -> bool:
    if not isinstance(value, list) or not value:
        return False
    for message in value:
        if (
            not isinstance(message, dict)
            or message.get("role") not in _ROLES
            or not isinstance(message.get("content"), str)
        ):
            return False
    text = "".join(message["content"] for message in value)
    return 0 < len(text.strip()) <= LONGEST_MESSAGES and value[-1]["role"] != "assistant"


def _rows(table: Any) -> list[dict[str, Any]]:
    return [dict(zip(_COLUMNS, row, strict=True)) for row in table[list(_COLUMNS)].itertuples(index=False, name=None)]


def _not_repeated(table: Any) -> list[bool]:
    keys = [same_key(row) for row in _rows(table)]
    count = Counter(keys)
    return [count[key] == 1 for key in keys]


def _not_on_both_sides(table: Any) -> list[bool]:
    sides: dict[Any, set[str]] = {}
    for step, split in zip(table["step"], table["split"], strict=True):
        sides.setdefault(step, set()).add(split)
    return [len(sides[step]) == 1 for step in table["step"]]


def _not_leaking(table: Any) -> list[bool]:
    leaking = {train for train, _ in near_equal(_rows(table))}
    return [i not in leaking for i in range(len(table))]


def _scripts(text: str) -> Counter[str]:
    """How many letters of each script, by the first word of the character's Unicode name."""
    return Counter(unicodedata.name(c, "?").split()[0] for c in text if c.isalpha())


def _main_script(rows: Sequence[Mapping[str, Any]]) -> str:
    total: Counter[str] = Counter()
    for row in rows:
        if isinstance(row["answer"], str):
            total += _scripts(row["answer"])
    return total.most_common(1)[0][0] if total else "LATIN"


def _script_fits(text: object, main: str) -> bool:
    if not isinstance(text, str):
        return False
    if any(c == "\ufffd" or (unicodedata.category(c) == "Cc" and c not in "\n\t\r") for c in text):
        return False
    found = _scripts(text)
    return not found or found[main] / sum(found.values()) >= LEAST_SCRIPT
