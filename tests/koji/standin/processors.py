"""kojihub's classes for SQL, as far as a plugin uses them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from koji.context import context


class QueryProcessor:
    """SELECT."""

    def __init__(
        self,
        *,
        tables: Sequence[str],
        columns: Sequence[str],
        aliases: Sequence[str] | None = None,
        clauses: Sequence[str] = (),
        joins: Sequence[str] = (),
        values: Mapping[str, Any] | None = None,
        opts: Mapping[str, Any] | None = None,
    ) -> None:
        self.values = dict(values or {})
        names = [f"{one} AS {alias}" for one, alias in zip(columns, aliases or columns)]
        self._sql = f"SELECT {', '.join(names if aliases else columns)} FROM {', '.join(tables)}"
        self._sql += "".join(f" JOIN {join}" for join in joins)
        self._sql += f" WHERE {_all(clauses)}" if clauses else ""
        if opts and "order" in opts:
            self._sql += f" ORDER BY {opts['order']}"

    def execute(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = context.db.rows(self._sql, self.values)
        return rows

    def executeOne(self, strict: bool = False) -> dict[str, Any] | None:
        return next(iter(self.execute()), None)

    def singleValue(self, strict: bool = True) -> Any:
        row = self.executeOne()
        return None if row is None else next(iter(row.values()))


class BulkInsertProcessor:
    """INSERT of several rows."""

    def __init__(self, table: str) -> None:
        self._table = table
        self.data: list[dict[str, Any]] = []

    def add_record(self, **columns: Any) -> None:
        self.data.append(columns)

    def execute(self) -> None:
        for record in self.data:
            context.db.insert(self._table, **record)


class InsertProcessor:
    """INSERT of one row."""

    def __init__(self, table: str, data: Mapping[str, Any] | None = None) -> None:
        self._table = table
        self._data = dict(data or {})

    def set(self, **columns: Any) -> None:
        self._data.update(columns)

    def execute(self) -> None:
        context.db.insert(self._table, **self._data)


class UpdateProcessor:
    """UPDATE."""

    def __init__(
        self,
        table: str,
        *,
        clauses: Sequence[str],
        values: Mapping[str, Any],
        data: Mapping[str, Any] | None = None,
    ) -> None:
        self._table = table
        self._clauses = clauses
        self._values = values
        self._data = dict(data or {})

    def set(self, **columns: Any) -> None:
        self._data.update(columns)

    def execute(self) -> None:
        places = ", ".join(f"{name} = %(new_{name})s" for name in self._data)
        new = {f"new_{name}": value for name, value in self._data.items()}
        context.db.rows(
            f"UPDATE {self._table} SET {places} WHERE {_all(self._clauses)}",
            {**self._values, **new},
        )


def _all(clauses: Sequence[str]) -> str:
    return " AND ".join(f"({clause})" for clause in clauses)
