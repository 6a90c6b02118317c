"""Amazon reviews as a source: a folder of `items.jsonl`, `train.csv`, `valid.csv` and `test.csv`.

| file | columns |
| --- | --- |
| `items.jsonl` | `item_id` (a whole number), `title`, `description`, `brand`, `categories` |
| `train.csv` | `user_id`, `position` (0 = oldest), `item_id` |
| `valid.csv`, `test.csv` | `user_id`, `history` (item ids, oldest first, by spaces), `target` |

An item is an ad and every event a conversion. The files have an order but no dates, so dates are
made up. The first partition day is `FIRST_DS`: position p of a training user with n positions is
placed n - p days before it. The second one holds the evaluation rows, each as a user of its own
(`valid-` or `test-` and the row's number, from 0) with exactly its history, one item a day up to
the day before, and its target on the day itself. All at noon (UTC).

Knows nothing of how cases are evaluated.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import html
import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from leadre_lib.contracts import load_contract
from leadre_lib.errors import LeadreError
from leadre_lib.settings import Settings
from leadre_lib.sources import RawDay, check_range

FIRST_DS = dt.date(2018, 12, 1)
SPLITS = ("valid", "test")
TITLE_CHARACTERS, DESCRIPTION_CHARACTERS = 120, 300
DAY_MICROS = 86_400_000_000
NOON = 12 * 3_600_000_000
EPOCH = dt.date(1970, 1, 1)


class Amazon:
    """One category of Amazon reviews as a source."""

    name = "amazon"
    has_ecpm = False

    def __init__(self, settings: Settings) -> None:
        """Read and check the folder `settings.data`.

        Raises:
            LeadreError: the folder, a file, a column or a value is missing or malformed; the
                message names the file and the line.
        """
        if settings.data is None:
            raise LeadreError("source amazon needs a folder: give DATA=folder or set LEADRE_DATA")
        if not settings.data.is_dir():
            raise LeadreError(f"source amazon: no folder {settings.data}: check DATA")
        self._items = _read_items(settings.data / "items.jsonl")
        known = self._items["ad_id"].combine_chunks()
        self._train = _read_train(settings.data / "train.csv", known)
        self._cases = {name: _read_cases(settings.data / f"{name}.csv", known) for name in SPLITS}
        files = ("items.jsonl", "train.csv", *(f"{name}.csv" for name in SPLITS))
        self.made_from = {
            name: hashlib.sha256((settings.data / name).read_bytes()).hexdigest() for name in files
        }
        counts = " and ".join(f"{len(rows)} {name}" for name, rows in self._cases.items())
        self.notes = [
            f"Amazon reviews: {FIRST_DS} holds train.csv, {self.last_ds()} the {counts} rows, each "
            "as a user of its own with exactly its history. Of all histories, those of train.csv "
            "alone are trained on, and synthetic ones made from these and the items' text.",
            "Made up: all dates. Items keep their order, one a day, ending the day before the "
            "partition day.",
            "There are no profiles, dismissals, content events, eCPM or GMV.",
        ]

    def first_ds(self) -> dt.date:
        """The day of the training rows."""
        return FIRST_DS

    def last_ds(self) -> dt.date:
        """The day of the evaluation rows."""
        return FIRST_DS + dt.timedelta(days=1)

    def raw_day(self, ds: dt.date) -> RawDay:
        """The raw tables of one of the two days.

        Raises:
            LeadreError: `ds` is neither of them.
        """
        check_range(self, ds)
        events = self._train_events() if ds == FIRST_DS else self._case_events()
        return {
            "raw_users": _users(events["user_id"]),
            "raw_ads": self._raw_ads(),
            "raw_ad_events": events,
            "raw_content_events": load_contract("raw_content_events").arrow_schema().empty_table(),
        }

    def _raw_ads(self) -> pa.Table:
        count = len(self._items)
        began = pc.min(self._train_events()["event_time"]).as_py().date()
        schema = load_contract("raw_ads").arrow_schema()
        columns = {name: self._items[name] for name in self._items.column_names}
        columns["marketing_object_id"] = self._items["ad_id"]
        columns["start_date"] = pa.repeat(min(began, FIRST_DS - dt.timedelta(days=365)), count)
        empty = {f.name: pa.nulls(count, f.type) for f in schema}
        return pa.table({**empty, **columns}).select(schema.names).cast(schema)

    def _train_events(self) -> pa.Table:
        rows = self._train
        user = rows["user_id"].combine_chunks().dictionary_encode()
        code = user.indices.to_numpy()
        position = rows["position"].to_numpy()
        count = np.zeros(len(user.dictionary), dtype=np.int64)
        np.maximum.at(count, code, position + 1)
        number = pc.utf8_lpad(rows["position"].cast(pa.string()), 6, "0")
        return _events(
            pc.binary_join_element_wise("train", rows["user_id"], number, "-"),
            rows["user_id"],
            rows["item_id"],
            FIRST_DS,
            count[code] - position,
        )

    def _case_events(self) -> pa.Table:
        return pa.concat_tables(
            [self._split_events(name, self._cases[name]) for name in sorted(SPLITS)]
        ).combine_chunks()

    def _split_events(self, split: str, cases: pa.Table) -> pa.Table:
        """The histories and targets of one split's rows; a target is 0 days before its day."""
        count = len(cases)
        history = cases["history"].combine_chunks()
        length = pc.list_value_length(history).to_numpy()
        row = np.concatenate([pc.list_parent_indices(history).to_numpy(), np.arange(count)])
        first = np.cumsum(length) - length
        within = np.arange(length.sum()) - np.repeat(first, length)
        step = np.concatenate([within, length])
        number = pc.utf8_lpad(pa.array(row).cast(pa.string()), 6, "0")
        users = pc.binary_join_element_wise(split, number, "-")
        item = pa.concat_arrays([pc.list_flatten(history), cases["target"].combine_chunks()])
        steps = pc.utf8_lpad(pa.array(step).cast(pa.string()), 6, "0")
        ids = pc.binary_join_element_wise(users, steps, "-")
        return _events(ids, users, item, self.last_ds(), length[row] - step)


def _events(ids: Any, users: Any, items: Any, day: dt.date, days_before: np.ndarray) -> pa.Table:
    """Conversions at noon so many days before a day, sorted by event id."""
    schema = load_contract("raw_ad_events").arrow_schema()
    moment = ((day - EPOCH).days - days_before) * DAY_MICROS + NOON
    columns = {
        "event_id": ids,
        "user_id": users,
        "ad_id": items,
        "event_type": pa.repeat("conversion", len(days_before)),
        "event_time": pa.array(moment),
    }
    empty = {f.name: pa.nulls(len(days_before), f.type) for f in schema}
    table = pa.table({**empty, **columns}).select(schema.names).cast(schema)
    return table.sort_by("event_id").combine_chunks()


def _users(ids: pa.ChunkedArray) -> pa.Table:
    """Users without profiles, sorted by id."""
    schema = load_contract("raw_users").arrow_schema()
    unique = pc.unique(ids)
    columns = {f.name: pa.nulls(len(unique), f.type) for f in schema} | {"user_id": unique}
    return pa.table(columns, schema=schema).sort_by("user_id")


# ---- reading and checking


def _text(value: Any) -> str:
    """A text field of an item: entities resolved, white space made even; '' for none."""
    return " ".join(html.unescape(value).split()) if isinstance(value, str) else ""


def _read_items(path: Path) -> pa.Table:
    """The items as ads: ad_id, advertiser_id, title, description, category; sorted by ad_id."""
    if not path.is_file():
        raise LeadreError(f"source amazon: no file {path}: the folder must hold it")
    rows: dict[str, dict[str, str]] = {}
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                item = json.loads(line)
                ad_id = str(int(item["item_id"]))
            except (ValueError, KeyError, TypeError) as error:
                raise LeadreError(
                    f"{path}, line {number}: expected a JSON object with a whole number item_id "
                    f"({type(error).__name__}: {error}): mend or remove the line"
                ) from None
            if ad_id in rows:
                raise LeadreError(f"{path}, line {number}: item_id {ad_id} occurs twice")
            rows[ad_id] = _ad(ad_id, item)
    if not rows:
        raise LeadreError(f"{path}: holds no items")
    return pa.Table.from_pylist(list(rows.values())).sort_by("ad_id")


def _ad(ad_id: str, item: dict[str, Any]) -> dict[str, str]:
    brand = _text(item.get("brand"))
    title = textwrap.shorten(_text(item.get("title")), TITLE_CHARACTERS, placeholder="")
    about = " ".join(filter(None, (brand, _text(item.get("description")))))
    categories = item.get("categories")
    if isinstance(categories, list):
        categories = categories[0] if categories else ""
    return {
        "ad_id": ad_id,
        "advertiser_id": brand or "unknown",
        "title": title or brand or f"untitled item {ad_id}",
        "description": textwrap.shorten(about, DESCRIPTION_CHARACTERS, placeholder=""),
        "category": _text(categories),
    }


def _read_csv(path: Path, columns: tuple[str, ...]) -> pa.Table:
    """The columns of a CSV file as text.

    Raises:
        LeadreError: no such file, no such column, or a row with too many or too few values.
    """
    if not path.is_file():
        raise LeadreError(f"source amazon: no file {path}: the folder must hold it")
    bad: list[Any] = []

    def remember(row: Any) -> str:
        bad.append(row)
        return "skip"

    try:
        table = csv.read_csv(
            path,
            read_options=csv.ReadOptions(use_threads=False),
            parse_options=csv.ParseOptions(invalid_row_handler=remember, ignore_empty_lines=False),
            convert_options=csv.ConvertOptions(
                column_types=dict.fromkeys(columns, pa.string()), strings_can_be_null=False
            ),
        )
    except pa.ArrowInvalid as error:
        raise LeadreError(f"{path}: no CSV file with the columns {columns}: {error}") from None
    for name in columns:
        if name not in table.column_names:
            raise LeadreError(f"{path}, line 1: no column {name!r}: expected {', '.join(columns)}")
    if bad:
        raise LeadreError(
            f"{path}, line {bad[0].number}: {bad[0].actual_columns} values, expected "
            f"{bad[0].expected_columns}: {bad[0].text!r}"
        )
    if not len(table):
        raise LeadreError(f"{path}: holds no rows")
    return table.select(columns).combine_chunks()


def _refuse(path: Path, bad: Any, values: Any, expected: str) -> None:
    """Raise an error for the first row that is bad, if there is one; line 1 is the head."""
    rows = np.flatnonzero(np.asarray(bad))
    if len(rows):
        row = int(rows[0])
        raise LeadreError(
            f"{path}, line {row + 2}: {values[row].as_py()!r} is {expected}: mend or remove the "
            f"line ({len(rows)} such)"
        )


def _unknown(values: Any, known: pa.Array) -> Any:
    return pc.invert(pc.is_in(values, known))


def _read_train(path: Path, known: pa.Array) -> pa.Table:
    """user_id, position (whole number), item_id; every item known, no position twice."""
    table = _read_csv(path, ("user_id", "position", "item_id"))
    user, position, item = (table[name] for name in table.column_names)
    _refuse(path, pc.equal(user, ""), user, "no user_id")
    digits = pc.match_substring_regex(position, r"^[0-9]{1,6}$")
    _refuse(path, pc.invert(digits), position, "no position (0 to 999999)")
    _refuse(path, _unknown(item, known), item, "no item_id of items.jsonl")
    key = pc.binary_join_element_wise(user, position, " ")
    codes = key.combine_chunks().dictionary_encode().indices.to_numpy()
    repeated = np.ones(len(codes), dtype=bool)
    repeated[np.unique(codes, return_index=True)[1]] = False
    _refuse(path, repeated, key, "a user and position that occurred before")
    return table.set_column(1, "position", position.cast(pa.int64()))


def _read_cases(path: Path, known: pa.Array) -> pa.Table:
    """history (a list of item ids, may be empty) and target of each row; every item known."""
    table = _read_csv(path, ("user_id", "history", "target"))
    text = pc.utf8_trim_whitespace(table["history"]).combine_chunks()
    parts = pc.split_pattern(text, " ")
    lengths = np.where(np.asarray(pc.equal(text, "")), 0, pc.list_value_length(parts).to_numpy())
    values = pc.list_flatten(parts)
    # an empty history splits into one empty text
    values = values.filter(pc.not_equal(values, "")) if (lengths == 0).any() else values
    wrong = np.zeros(len(table), dtype=bool)
    if len(values) != lengths.sum():
        double = pc.match_substring(text, "  ")
        _refuse(path, double, table["history"], "no history (ids must be parted by one space)")
    owner = np.repeat(np.arange(len(table)), lengths)
    wrong[owner[np.asarray(_unknown(values, known))]] = True
    _refuse(path, wrong, table["history"], "no history of items of items.jsonl")
    _refuse(path, _unknown(table["target"], known), table["target"], "no item_id of items.jsonl")
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    history = pa.ListArray.from_arrays(offsets, values)
    return pa.table({"history": history, "target": table["target"]})
