"""Amazon: cases with exactly their history, pseudo-dates, texts, and malformed folders."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path

import pytest

from leadre_lib.contracts import RAW_TABLES, load_contract
from leadre_lib.errors import LeadreError
from leadre_lib.settings import load_settings
from leadre_lib.sources import open_source
from leadre_lib.sources.amazon import FIRST_DS, Amazon

SECOND_DS = FIRST_DS + dt.timedelta(days=1)
ITEMS = [
    {"item_id": 0, "title": "Hex  bolts &amp; nuts", "description": "Steel.", "brand": "Boltco"},
    {"item_id": 1, "title": "word " * 60, "description": "long " * 200, "brand": ""},
    {"item_id": 2, "title": "", "brand": "Tapeworks", "categories": ["Tapes", "Foil"]},
    {"item_id": 10, "title": "", "description": None, "brand": "", "categories": ""},
]
FILES = {
    "items.jsonl": "".join(json.dumps(item) + "\n" for item in ITEMS),
    "train.csv": "user_id,position,item_id\nA2,0,1\nA1,0,0\nA1,1,2\nA1,2,10\n",
    "valid.csv": "user_id,history,target\nA1,0 2 10,1\n",
    "test.csv": "user_id,history,target\nA1,0 2 10 1,2\nA2,,0\n",
}


def folder(path: Path, **replaced: str | None) -> Path:
    """The files, some replaced (by stem) or, with None, left out."""
    for name, text in FILES.items():
        content = replaced.get(name.split(".")[0], text)
        if content is not None:
            (path / name).write_text(content, encoding="utf-8")
    return path


def make(path: Path) -> Amazon:
    source = open_source(load_settings(source="amazon", data=path))
    assert isinstance(source, Amazon)
    return source


def noon(day: int, month: int = 12) -> dt.datetime:
    return dt.datetime(2018, month, day, 12, tzinfo=dt.UTC)


def test_tables_are_the_contracts(tmp_path: Path) -> None:
    source = make(folder(tmp_path))
    assert not source.has_ecpm
    assert (source.first_ds(), source.last_ds()) == (FIRST_DS, SECOND_DS)
    for ds in (FIRST_DS, SECOND_DS):
        day = source.raw_day(ds)
        assert list(day) == list(RAW_TABLES)
        for name, table in day.items():
            assert table.schema.equals(load_contract(name).arrow_schema())
        assert day["raw_content_events"].num_rows == 0
    with pytest.raises(LeadreError, match="2018-12-03"):
        source.raw_day(SECOND_DS + dt.timedelta(days=1))


def test_training_rows_end_the_day_before_the_first_day(tmp_path: Path) -> None:
    day = make(folder(tmp_path)).raw_day(FIRST_DS)
    assert day["raw_users"]["user_id"].to_pylist() == ["A1", "A2"]
    events = day["raw_ad_events"].to_pylist()
    assert [(e["user_id"], e["ad_id"], e["event_time"]) for e in events] == [
        ("A1", "0", noon(28, 11)),
        ("A1", "2", noon(29, 11)),
        ("A1", "10", noon(30, 11)),
        ("A2", "1", noon(30, 11)),
    ]
    assert {e["event_type"] for e in events} == {"conversion"}
    assert {e["ecpm"] for e in events} == {None}


def test_a_case_has_exactly_its_history_and_its_target(tmp_path: Path) -> None:
    day = make(folder(tmp_path)).raw_day(SECOND_DS)
    assert day["raw_users"]["user_id"].to_pylist() == ["test-000000", "test-000001", "valid-000000"]
    events = day["raw_ad_events"].to_pylist()
    assert len({e["event_id"] for e in events}) == len(events) == 10
    cases: dict[str, list[tuple[str, dt.datetime]]] = {}
    for event in sorted(events, key=lambda e: e["event_time"]):
        cases.setdefault(event["user_id"], []).append((event["ad_id"], event["event_time"]))
    assert cases == {
        "test-000000": [
            *(("0", noon(28, 11)), ("2", noon(29, 11)), ("10", noon(30, 11))),
            *(("1", noon(1)), ("2", noon(2))),
        ],
        "test-000001": [("0", noon(2))],
        "valid-000000": [
            *(("0", noon(29, 11)), ("2", noon(30, 11)), ("10", noon(1))),
            ("1", noon(2)),
        ],
    }


def test_items_are_ads_with_texts(tmp_path: Path) -> None:
    ads = {
        ad["ad_id"]: ad for ad in make(folder(tmp_path)).raw_day(FIRST_DS)["raw_ads"].to_pylist()
    }
    assert list(ads) == ["0", "1", "10", "2"]
    assert ads["0"]["title"] == "Hex bolts & nuts"
    assert ads["0"]["description"] == "Boltco Steel."
    assert ads["0"]["advertiser_id"] == "Boltco"
    assert 100 < len(ads["1"]["title"]) <= 120
    assert ads["1"]["title"].endswith("word")
    assert len(ads["1"]["description"]) <= 300
    assert ads["1"]["advertiser_id"] == "unknown"
    assert ads["2"]["title"] == "Tapeworks"
    assert ads["2"]["category"] == "Tapes"
    assert ads["10"]["title"] == "untitled item 10"
    assert ads["10"]["category"] == ""
    assert all(ad["start_date"] < dt.date(2018, 1, 1) and ad["bid"] is None for ad in ads.values())


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"items": None}, r"no file .*items\.jsonl"),
        ({"train": None}, r"no file .*train\.csv"),
        ({"test": None}, r"no file .*test\.csv"),
        ({"items": ""}, r"items\.jsonl: holds no items"),
        ({"items": FILES["items.jsonl"] + "{broken\n"}, r"items\.jsonl, line 5"),
        ({"items": FILES["items.jsonl"] + '{"title": "x"}\n'}, r"items\.jsonl, line 5.*item_id"),
        ({"items": FILES["items.jsonl"] + '{"item_id": 2}\n'}, r"line 5: item_id 2 occurs twice"),
        ({"train": "user,position,item_id\nA1,0,0\n"}, r"train\.csv, line 1: no column 'user_id'"),
        ({"train": "user_id,position,item_id\n"}, r"train\.csv: holds no rows"),
        ({"train": ""}, r"train\.csv: no CSV file"),
        ({"train": FILES["train.csv"] + "A1,3\n"}, r"train\.csv, line 6: 2 values, expected 3"),
        ({"train": FILES["train.csv"] + "A1,x,0\n"}, r"train\.csv, line 6: 'x' is no position"),
        ({"train": FILES["train.csv"] + "A1,3,99\n"}, r"train\.csv, line 6: '99' is no item_id"),
        ({"train": FILES["train.csv"] + "A1,2,0\n"}, r"train\.csv, line 6: .* occurred before"),
        ({"train": FILES["train.csv"] + ",3,0\n"}, r"train\.csv, line 6: '' is no user_id"),
        (
            {"valid": FILES["valid.csv"] + "A2,0 99,1\n"},
            r"valid\.csv, line 3: '0 99' is no history",
        ),
        (
            {"valid": FILES["valid.csv"] + "A2,0  1,1\n"},
            r"valid\.csv, line 3: '0  1' is no history",
        ),
        ({"test": FILES["test.csv"] + "A2,0,\n"}, r"test\.csv, line 4: '' is no item_id"),
    ],
)
def test_a_malformed_folder_is_named(
    tmp_path: Path, replaced: dict[str, str | None], message: str
) -> None:
    with pytest.raises(LeadreError, match=message):
        make(folder(tmp_path, **replaced))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(LeadreError, match="nowhere"):
        open_source(load_settings(source="amazon", data=tmp_path / "nowhere"))
    with pytest.raises(LeadreError, match="DATA"):
        open_source(load_settings(source="amazon"))
