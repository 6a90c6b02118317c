"""Semantic IDs over days: what stays, what is new, when a codebook has drifted, and a refresh."""

from __future__ import annotations

import datetime as dt
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from leadre_lib.assignment import (
    assign_day,
    by_object,
    compare,
    drift,
    first_codebook,
    refresh,
)
from leadre_lib.catalogue import catalogue
from leadre_lib.embeddings import text_hash
from leadre_lib.quantisers import Codebook
from leadre_lib.semantic_ids import codes_of
from leadre_lib.settings import Settings, load_settings
from tests.worlds import DAY0, ad, rows

BRANDS = ("Nord", "Alba", "Corvo", "Tern", "Mica", "Onda", "Pico", "Sol")
SPORTS = ("trail shoes", "swim goggles", "tennis racket", "bike helmet", "yoga mat", "ski poles")
KITCHEN = ("iron pan", "bread knife", "tea kettle", "spice rack", "cake tin", "salad bowl")
LOOKS = ("in red", "in blue", "for children")


def products(things: tuple[str, ...]) -> list[str]:
    return [" ".join(words) for words in itertools.product(BRANDS, things, LOOKS)]


def ads_of(titles: dict[str, str], stopped: frozenset[str] = frozenset()) -> pa.Table:
    """Two ads an object: its own text, and another wording of it."""
    records: list[dict[str, Any]] = []
    for name, title in titles.items():
        for nth, text in enumerate((title, f"{title}, today only")):
            more = {"stop_date": DAY0} if name in stopped else {}
            record = ad(f"{name}-{nth}", text, marketing_object_id=name, **more)
            records.append({**record, "text_hash": text_hash(text, None)})
    return rows("ads", records)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings whose embeddings are cached for all tests here."""
    sizes = {"levels": 2, "codes": 16, "method": "rq-kmeans-balanced", "epochs": 20}
    return load_settings(home=tmp_path_factory.mktemp("home"), semantic_ids=sizes)


@pytest.fixture(scope="module")
def sports() -> dict[str, str]:
    return {f"s{n:03}": title for n, title in enumerate(products(SPORTS))}


@pytest.fixture(scope="module")
def codebook(home: Settings, sports: dict[str, str]) -> Codebook:
    return first_codebook(ads_of(sports), home, "encoder")


def ids(table: pa.Table) -> dict[str, str]:
    names = table["marketing_object_id"].to_pylist()
    return dict(zip(names, table["semantic_id"].to_pylist(), strict=True))


def test_ids_stay_through_days_of_churn(
    home: Settings, codebook: Codebook, sports: dict[str, str]
) -> None:
    rng = np.random.default_rng(0)
    pool = iter(products(KITCHEN))
    titles, stopped = dict(sports), frozenset[str]()
    table = assign_day(ads_of(titles), None, codebook, home)
    for day in range(6):
        before = ids(table)
        names = sorted(titles.keys() - stopped)
        gone, changed = rng.choice(names, 6, replace=False)[:3], rng.choice(names, 2)
        stopped |= set(gone.tolist())
        titles |= {f"t{day}{n}": next(pool) for n in range(3)}
        titles |= {name: f"{titles[name]}, now better" for name in changed.tolist()}
        del titles[min(titles)]  # and one is in the snapshot no longer
        table = assign_day(ads_of(titles, stopped), table, codebook, home)
        after = ids(table)
        assert all(after[name] == sid for name, sid in before.items())
        assert len(set(after.values())) == len(after) == len(before) + 3
        assert table["ad_id"].to_pylist() == sorted(table["ad_id"].to_pylist())
        assert len(table) == 2 * len(after)


def test_an_ad_that_sells_something_else_now_takes_its_id(
    home: Settings, codebook: Codebook, sports: dict[str, str]
) -> None:
    first = assign_day(ads_of(sports), None, codebook, home)
    records = ads_of(sports).to_pylist()
    records[1]["marketing_object_id"] = "s005"
    table = assign_day(rows("ads", records), first, codebook, home)
    by_ad = dict(zip(table["ad_id"].to_pylist(), table["semantic_id"].to_pylist(), strict=True))
    assert by_ad["s000-1"] == by_ad["s005-0"] != by_ad["s000-0"]


def drifted(home: Settings, codebook: Codebook, sports: dict[str, str]) -> tuple[pa.Table, ...]:
    """A catalogue that sells kitchenware too: yesterday's rows, today's ads, today's rows."""
    old = assign_day(ads_of(sports), None, codebook, home)
    titles = dict(list(sports.items())[10:])  # ten have left the snapshot
    changed = list(titles)[:4]
    titles |= dict.fromkeys(changed, "espresso machine of steel")
    titles |= {f"k{n:03}": title for n, title in enumerate(products(KITCHEN))}
    ads = ads_of(titles, frozenset(list(titles)[20:25]))
    return old, ads, assign_day(ads, old, codebook, home)


def test_drift_is_seen_and_a_refresh_cures_it(
    home: Settings, codebook: Codebook, sports: dict[str, str]
) -> None:
    old, ads, table = drifted(home, codebook, sports)
    assert not drift(catalogue(ads_of(sports), old, DAY0), codebook, home).reasons
    seen = drift(catalogue(ads, table, DAY0), codebook, home)
    assert seen.error > 1.25
    assert any("refresh_error = 1.25" in reason for reason in seen.reasons)

    fresh, moved_rows = refresh(ads, table, table["marketing_object_id"], codebook, home, DAY0)
    again = refresh(ads, table, table["marketing_object_id"], codebook, home, DAY0)
    assert (again[0].version, again[1].equals(moved_rows)) == (fresh.version, True)
    assert fresh.config["refreshed_from"] == codebook.version
    cured = drift(catalogue(ads, moved_rows, DAY0), fresh, home)
    assert cured.error == pytest.approx(1.0, abs=1e-4)
    assert not cured.reasons
    assert fresh.error < 0.9 * seen.error * codebook.error

    before, after = ids(table), ids(moved_rows)
    assert before.keys() == after.keys()
    assert len(set(after.values())) == len(after)
    assert set(moved_rows["codebook"].to_pylist()) == {fresh.version}
    gone = list(sports)[:10]
    assert all(after[name] == before[name] for name in gone)
    # What moved does not take what another gave up.
    other = {name for name in after if after[name] != before[name]}
    assert not {after[name] for name in other} & set(before.values())


def test_a_refresh_moves_few_and_lists_them(
    home: Settings, codebook: Codebook, sports: dict[str, str]
) -> None:
    _, ads, table = drifted(home, codebook, sports)
    fresh, after = refresh(ads, table, table["marketing_object_id"], codebook, home, DAY0)
    moves = compare(by_object(table), by_object(after), codebook.sizes, fresh.sizes)
    assert moves.unchanged == 10 + 130 + 144
    assert 0.95 <= moves.kept < 1
    assert len(moves.moved) > 0
    assert set(moves.moved["text_changed"].to_pylist()) == {True, False}
    before = ids(table)
    for row in moves.moved.to_pylist():
        assert row["before"] == before[row["marketing_object_id"]] != row["after"]
    strict = home.model_copy(
        update={"semantic_ids": home.semantic_ids.model_copy(update={"max_moved": 0.0})}
    )
    _, still = refresh(ads, table, table["marketing_object_id"], codebook, strict, DAY0)
    only = compare(by_object(table), by_object(still), codebook.sizes, fresh.sizes)
    assert only.kept == 1
    assert set(only.moved["text_changed"].to_pylist()) == {True}


def test_an_object_that_no_model_knows_yet_moves_freely(
    home: Settings, codebook: Codebook, sports: dict[str, str]
) -> None:
    old, ads, table = drifted(home, codebook, sports)
    strict = home.model_copy(
        update={"semantic_ids": home.semantic_ids.model_copy(update={"max_moved": 0.0})}
    )
    settled = old["marketing_object_id"]
    _, after = refresh(ads, table, settled, codebook, strict, DAY0)
    before, now = ids(table), ids(after)
    moved = {name for name in now if now[name] != before[name]}
    assert len({name for name in moved if name.startswith("k")}) > 50
    known = set(settled.to_pylist())
    titles = dict(
        zip(ads["marketing_object_id"].to_pylist(), ads["title"].to_pylist(), strict=True)
    )
    assert all(titles[name].startswith("espresso") for name in moved & known)


def test_what_a_code_was_called_before(
    home: Settings, codebook: Codebook, sports: dict[str, str]
) -> None:
    table = by_object(assign_day(ads_of(sports), None, codebook, home))
    same = compare(table, table, codebook.sizes, codebook.sizes)
    assert (same.unchanged, same.kept, len(same.moved)) == (144, 1.0, 0)
    for share in same.shares:
        np.testing.assert_array_equal(share, np.eye(16))
    codes = codes_of(table)
    codes[:, 0] = 20
    wide = table.set_column(2, "codes", pa.array(list(codes), pa.list_(pa.int32())))
    first = compare(table, wide, codebook.sizes, [32, 16]).shares[0]
    np.testing.assert_allclose(first[20], np.bincount(codes_of(table)[:, 0], minlength=16) / 144)
    np.testing.assert_array_equal(first[:16], np.eye(16))
    assert not first[[16, 31]].any()


def test_a_catalogue_that_grew_gets_more_codes(
    home: Settings, sports: dict[str, str], tmp_path: Path
) -> None:
    free = home.model_copy(
        update={"semantic_ids": home.semantic_ids.model_copy(update={"codes": 0})}
    )
    few = dict(list(sports.items())[:60])
    book = first_codebook(ads_of(few), free, "encoder")
    assert book.sizes == [16, 16]
    table = assign_day(ads_of(few), None, book, free)
    titles = sports | {f"k{n:03}": title for n, title in enumerate(products(KITCHEN))}
    grown = assign_day(ads_of(titles), table, book, free)
    fresh, after = refresh(
        ads_of(titles), grown, grown["marketing_object_id"], book, free, DAY0 + dt.timedelta(days=1)
    )
    assert fresh.sizes == [64, 64]
    moves = compare(by_object(grown), by_object(after), book.sizes, fresh.sizes)
    assert moves.kept >= 0.95
    assert [share.shape for share in moves.shares] == [(64, 16)] * 2
    assert codes_of(after)[:, 0].max() >= 16
