"""Rows of text and target out of JSON Lines, CSV, TSV and Parquet files, each with its place."""

import csv
import difflib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.core.errors import RequestError
from lora_jax.io.atomic import atomic_path
from lora_jax.io.untrusted import parse_json

EXTENSIONS = {
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "csv": (".csv",),
    "tsv": (".tsv", ".txt"),
    "parquet": (".parquet", ".pq"),
}


class Row(NamedTuple):
    """One text with its target; `place` says where it stands, as "file:line" or "file row N"."""

    text: str
    label: str
    place: str


def read_rows(
    path: Path, kind: str, *, text_column: str, label_column: str, target: str = "class"
) -> list[Row]:
    """All rows of one file, in order; `kind` is one of `EXTENSIONS`.

    CSV is RFC 4180 (quoted fields may hold line ends), TSV the IANA kind (nothing is quoted); both
    begin with a line of column names. Labels may be strings, whole numbers or true/false; with
    `target` "number" any numbers (kept as text), with "text" completions. Raises `RequestError`
    that names the line for a row that cannot be read, lacks a text or a label, and for a file that
    is empty, unreadable or without the columns.
    """
    rows = [
        _make_row(record, place, text_column, label_column, target)
        for record, place in _records(path, kind, (text_column, label_column))
    ]
    if not rows:
        raise RequestError(f"{path} holds no examples; data.path must name a file with rows")
    return rows


def kind_of(path: Path) -> str:
    """The one of `EXTENSIONS` that the path ends in. Raises `RequestError` if it ends in none."""
    for kind, endings in EXTENSIONS.items():
        if path.suffix.lower() in endings:
            return kind
    known = ", ".join(endings[0] for endings in EXTENSIONS.values())
    raise RequestError(f"{path} ends in none of {known}, which say how to read or write it")


def read_texts(path: Path, columns: Sequence[str]) -> list[tuple[dict[str, Any], str]]:
    """All records of one file, each with its place; every one has a text in each of `columns`.

    Raises `RequestError` as `read_rows` does, labels apart.
    """
    records = list(_records(path, kind_of(path), None))
    if not records:
        raise RequestError(f"{path} holds no rows")
    for record, place in records:
        for name in columns:
            _text(record, name, "the column of the texts (--text=…)", place)
    return records


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows as the kind of file that the path ends in, atomically.

    In CSV and TSV the columns are those of all rows, lists and dicts are JSON. Raises
    `RequestError` for another ending, or values that the kind cannot hold (a tab in TSV).
    """
    kind = kind_of(path)
    with atomic_path(path) as temporary:
        if kind == "parquet":
            import pyarrow
            import pyarrow.parquet

            try:
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), temporary)
            except pyarrow.ArrowException as error:
                raise RequestError(f"{path}: {error}; write jsonl instead") from error
            return
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            if kind == "jsonl":
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                return
            names = list(dict.fromkeys(name for row in rows for name in row))
            format = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == "tsv" else {}
            writer = csv.writer(file, lineterminator="\n", **format)
            try:
                writer.writerow(names)
                writer.writerows([_cell(row.get(name)) for name in names] for row in rows)
            except csv.Error as error:
                raise RequestError(
                    f"{path}: a value holds a tab or a line end, which TSV cannot say; write "
                    "csv or jsonl instead"
                ) from error


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value


def _records(
    path: Path, kind: str, columns: Sequence[str] | None
) -> Iterator[tuple[dict[str, Any], str]]:
    """Records and their places; of Parquet only `columns` are read (None: all)."""
    if kind == "parquet":
        return _read_parquet(path, columns)
    if kind == "jsonl":
        return _read_jsonl(path)
    lines = (line for _, line in read_lines(path))
    if kind == "csv":
        return _delimited(path, csv.reader(lines, strict=True))
    return _delimited(path, csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))


def nearest_name(name: str, choices: Sequence[str]) -> str:
    """A clause that names the choice most like `name`, or nothing."""
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.4)
    return f" (nearest: {near[0]!r})" if near else ""


def _read_jsonl(path: Path) -> Iterator[tuple[dict, str]]:
    for number, line in read_lines(path):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            record = parse_json(line, halves=True)
        except (ValueError, RecursionError) as error:
            raise RequestError(
                f"{place}: not a JSON object ({error}); write one object a line"
            ) from error
        if not isinstance(record, dict):
            raise RequestError(
                f"{place}: a JSON {type(record).__name__}, not an object; write one object a line"
            )
        yield record, place


def _delimited(path: Path, reader: Any) -> Iterator[tuple[dict, str]]:
    """Records of a csv reader; `place` is the line a record begins on."""
    header: list[str] = []
    start = 1
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise RequestError(
                f"{path}:{start}: not a readable row ({error}); check its quotes"
            ) from error
        place, start = f"{path}:{start}", reader.line_num + 1
        if not fields:
            continue
        if not header:
            header = fields
            if len(set(header)) < len(header):
                raise RequestError(f"{place}: a column name stands twice in {header}; rename one")
        elif len(fields) != len(header):
            raise RequestError(
                f"{place}: {len(fields)} fields where the first line has {len(header)} columns; "
                "quote or remove stray separators"
            )
        else:
            yield dict(zip(header, fields, strict=True)), place


def _read_parquet(path: Path, columns: Sequence[str] | None) -> Iterator[tuple[dict, str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            # A missing column is reported with all those there, so then all are read.
            there = file.schema_arrow.names
            wanted = list(columns) if columns and set(columns) <= set(there) else None
            number = 0
            for batch in file.iter_batches(columns=wanted):
                for record in batch.to_pylist():
                    number += 1
                    yield record, f"{path} row {number}"
    except (pyarrow.ArrowException, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise RequestError(f"cannot read {path} as parquet: {reason}") from error


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines with their ends kept, split at line feeds only, decoded from UTF-8."""
    number = 1
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{path}:{number}: not UTF-8 ({error.reason}); save the file as UTF-8"
        ) from error
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror or error}") from error


def _make_row(record: dict, place: str, text_column: str, label_column: str, target: str) -> Row:
    text = _text(record, text_column, "data.text", place)
    if target == "text":
        return Row(text, _text(record, label_column, "data.label", place).strip(), place)
    label = _column(record, label_column, "data.label", place)
    read = _number if target == "number" else _label
    return Row(text, read(label, place, label_column), place)


def _text(record: dict, name: str, setting: str, place: str) -> str:
    text = _column(record, name, setting, place)
    if not isinstance(text, str | None):
        raise RequestError(
            f"{place}: column {name!r} holds {text!r}, not a text; {_columns(record)}"
        )
    if text is None or not text.strip():
        raise RequestError(f"{place}: column {name!r} is empty; fill it or remove the row")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{place}: column {name!r} holds half a character (a lone surrogate); correct it"
        ) from error
    return text


def _column(record: dict, name: str, setting: str, place: str) -> Any:
    if name in record:
        return record[name]
    hint = nearest_name(name, list(record))
    raise RequestError(f"{place}: no column {name!r}{hint}; {_columns(record)}; set {setting}")


def _columns(record: dict) -> str:
    return f"columns there: {', '.join(repr(key) for key in record) or 'none'}"


def _label(value: Any, place: str, column: str) -> str:
    """The label as a string; 1, 1.0 and "1" are one label."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, str) and value.strip():
        return value.strip()
    if value is None or isinstance(value, str) or (isinstance(value, float) and math.isnan(value)):
        raise RequestError(f"{place}: column {column!r} has no label; fill it or remove the row")
    raise RequestError(
        f"{place}: column {column!r} holds {value!r}; a label is a string or a whole number"
    )


def _number(value: Any, place: str, column: str) -> str:
    """The label of a regression, as text that `float` reads."""
    try:
        if not isinstance(value, bool) and abs(float(value)) < 3e38:
            return str(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise RequestError(f"{place}: column {column!r} holds {value!r}, not a number; correct it")
