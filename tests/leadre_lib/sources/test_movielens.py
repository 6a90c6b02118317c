"""MovieLens: what becomes of ratings, what is held out, and a wheel that can't be had."""

from __future__ import annotations

import datetime as dt
import hashlib
import zipfile
from pathlib import Path

import pytest

from leadre_lib.contracts import RAW_TABLES, load_contract
from leadre_lib.errors import LeadreError
from leadre_lib.settings import MovieLensSettings, load_settings
from leadre_lib.sources import open_source
from leadre_lib.sources.movielens import FOLDER, MovieLens

USERS = """user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token
1\t24\tM\ttechnician\t85711
2\t53\tF\tother\tT8H1N
10\t31\tF\twriter\t02139
"""
ITEMS = """item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq
1\tToy Story\t1995\tAnimation Children's Comedy
2\tUsual Suspects, The\t1995\tCrime Thriller
3\tMisérables, Les\t1995\tDrama
11\tAlien\t1979\tHorror
"""
# user 1 has a tie, user 2 no conversion, user 10 ends with what is no conversion
RATINGS = """user_id:token\titem_id:token\trating:float\ttimestamp:float
1\t11\t5\t893286638
1\t2\t4\t893286638
1\t1\t4\t881250949
2\t1\t3\t881250900
2\t2\t1\t881250901
10\t1\t5\t882000000
10\t3\t4\t882000001
10\t2\t3\t882000002
10\t11\t2\t882000003
"""
DAY0, DAY1 = dt.date(1998, 4, 23), dt.date(1998, 4, 24)


def make(home: Path, **section: object) -> MovieLens:
    """The source on a small wheel of the real form, placed in the cache."""
    wheel = home / "cache" / "downloads" / "recbole-9.9-py3-none-any.whl"
    wheel.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        for kind, text in (("user", USERS), ("item", ITEMS), ("inter", RATINGS)):
            archive.writestr(f"{FOLDER}/ml-100k.{kind}", text)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    values = {"recbole_version": "9.9", "sha256": digest, **section}
    source = open_source(load_settings(source="movielens", home=home, movielens=values))
    assert isinstance(source, MovieLens)
    return source


def test_tables_are_the_contracts(tmp_path: Path) -> None:
    source = make(tmp_path)
    assert (source.first_ds(), source.last_ds()) == (DAY0, DAY1)
    for ds in (DAY0, DAY1):
        day = source.raw_day(ds)
        assert list(day) == list(RAW_TABLES)
        for name, table in day.items():
            assert table.schema.equals(load_contract(name).arrow_schema())
    with pytest.raises(LeadreError, match="1998-04-25"):
        source.raw_day(dt.date(1998, 4, 25))


def test_profiles_and_films(tmp_path: Path) -> None:
    day = make(tmp_path).raw_day(DAY0)
    users = day["raw_users"].to_pylist()
    assert [user["user_id"] for user in users] == ["u0001", "u0002", "u0010"]
    assert users[0]["age"] == 24
    assert users[0]["gender"] == "male"
    assert users[0]["residence"] == "Mountain West"
    assert users[1]["residence"] is None  # not a US code
    assert users[1]["occupation"] is None
    ads = day["raw_ads"].to_pylist()
    assert [ad["ad_id"] for ad in ads] == ["m0001", "m0002", "m0003", "m0011"]
    assert ads[0]["category"] == "movie/animation"
    assert ads[0]["description"] == "1995, Animation, Children's, Comedy"
    assert ads[1]["title"] == "The Usual Suspects"
    assert all(ad["start_date"] <= DAY0 and ad["stop_date"] is None for ad in ads)


def test_the_tail_is_the_last_conversion_and_all_after_it(tmp_path: Path) -> None:
    source = make(tmp_path)
    past, tail = (source.raw_day(ds)["raw_ad_events"].to_pylist() for ds in (DAY0, DAY1))
    assert [(e["event_id"], e["event_type"]) for e in tail] == [
        ("u0001-m0011", "conversion"),  # of two at one second, the film with the larger number
        ("u0010-m0002", "click"),
        ("u0010-m0003", "conversion"),
        ("u0010-m0011", "dismiss"),
    ]
    assert [e["event_id"] for e in past] == [
        *("u0001-m0001", "u0001-m0002"),
        *("u0002-m0001", "u0002-m0002"),
        "u0010-m0001",
    ]
    assert tail[0]["event_time"] == dt.datetime(1998, 4, 22, 23, 10, 38, tzinfo=dt.UTC)


def test_more_can_be_held_out(tmp_path: Path) -> None:
    source = make(tmp_path, eval_last=3)
    tail = source.raw_day(DAY1)["raw_ad_events"]
    assert set(tail["user_id"].to_pylist()) == {"u0001"}
    assert tail.num_rows == 3
    assert any("1 users" in note for note in source.notes)


def test_a_film_has_one_ecpm_on_both_days(tmp_path: Path) -> None:
    source = make(tmp_path)
    both = [e for ds in (DAY0, DAY1) for e in source.raw_day(ds)["raw_ad_events"].to_pylist()]
    films = {(e["ad_id"], e["ecpm"]) for e in both}
    assert len(films) == 4
    assert all(ecpm > 0 for _, ecpm in films)


def test_a_wheel_that_cannot_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    settings = load_settings(source="movielens", home=tmp_path)
    with pytest.raises(LeadreError, match=r"can't fetch recbole .*downloads"):
        open_source(settings)


def test_a_damaged_wheel_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(LeadreError, match="can't fetch"):
        make(tmp_path, sha256="0" * 64)


def test_a_wheel_with_another_checksum_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "index")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_FIND_LINKS", str(_installable(tmp_path / "links")))
    settings = load_settings(
        source="movielens",
        home=tmp_path / "home",
        movielens={"recbole_version": "9.9", "sha256": "0" * 64},
    )
    with pytest.raises(LeadreError, match="has the SHA-256"):
        open_source(settings)


def _installable(folder: Path) -> Path:
    """A folder with a wheel that pip takes for recbole 9.9."""
    folder.mkdir()
    with zipfile.ZipFile(folder / "recbole-9.9-py3-none-any.whl", "w") as archive:
        info = "recbole-9.9.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: recbole\nVersion: 9.9\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return folder


def test_the_real_data(tmp_path: Path) -> None:
    try:
        source = open_source(load_settings(source="movielens", home=tmp_path))
    except LeadreError as error:
        if "can't fetch" not in str(error):
            raise
        pytest.skip(f"no package index: {error}")
    day0, day1 = source.raw_day(DAY0), source.raw_day(DAY1)
    assert MovieLensSettings().eval_last == 1
    assert day0["raw_users"].num_rows == 943
    assert day0["raw_ads"].num_rows == 1682
    assert day0["raw_ad_events"].num_rows + day1["raw_ad_events"].num_rows == 100_000
    conversions = day1["raw_ad_events"]["event_type"].to_pylist().count("conversion")
    assert conversions == len(set(day1["raw_ad_events"]["user_id"].to_pylist())) == 942
