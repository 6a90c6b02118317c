"""The lake: atomic partitions, conflicts, versions, restore, orphans, damaged files."""

from __future__ import annotations

import datetime as dt
import threading
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from leadre_lib.lake import Attempt, ConflictError, Lake, LakeError
from tests.worlds import DAY0, DAY1, rows

METRIC = {"method": "m", "split": "test", "value": 0.5, "cases": 3}


def metrics(*names: str) -> pa.Table:
    return rows("metrics", [{**METRIC, "metric": name} for name in names])


def publish(lake: Lake, ds: dt.date, *names: str) -> str:
    with lake.begin("metrics", ds) as attempt:
        attempt.write(metrics(*names))
        return attempt.commit().digest


def test_a_partition_is_replaced_whole(lake: Lake) -> None:
    publish(lake, DAY0, "a", "b")
    publish(lake, DAY1, "c")
    publish(lake, DAY0, "d")
    assert lake.read("metrics", DAY0)["metric"].to_pylist() == ["d"]
    assert lake.read("metrics", DAY1)["metric"].to_pylist() == ["c"]
    assert lake.days("metrics") == [DAY0, DAY1]


def test_an_empty_partition_is_published_and_not_missing(lake: Lake) -> None:
    publish(lake, DAY0, "a")
    with lake.begin("metrics", DAY0) as attempt:
        attempt.commit()
    assert lake.has("metrics", DAY0)
    assert lake.read("metrics", DAY0).num_rows == 0
    with pytest.raises(LakeError, match="metrics has no partition ds=2026-03-03"):
        lake.read("metrics", DAY1)


def test_staged_files_are_invisible_and_an_abandoned_attempt_leaves_none(lake: Lake) -> None:
    publish(lake, DAY0, "a")
    with lake.begin("metrics", DAY0) as attempt:
        attempt.write(metrics("b"))
        assert attempt.folder.exists()
        assert lake.read("metrics", DAY0)["metric"].to_pylist() == ["a"]
    assert not attempt.folder.exists()
    assert lake.read("metrics", DAY0)["metric"].to_pylist() == ["a"]


@pytest.mark.parametrize("already", [False, True])
def test_of_two_writers_of_one_partition_one_wins(lake: Lake, already: bool) -> None:
    if already:
        publish(lake, DAY0, "old")
    first, second = lake.begin("metrics", DAY0), lake.begin("metrics", DAY0)
    first.write(metrics("first"))
    second.write(metrics("second"))
    first.commit()
    with pytest.raises(ConflictError, match="2026-03-02"):
        second.commit()
    assert lake.read("metrics", DAY0)["metric"].to_pylist() == ["first"]


def test_two_partitions_at_once_both_land(lake: Lake) -> None:
    days = [DAY0 + dt.timedelta(days=n) for n in range(4)]
    attempts = [Lake(lake.root).begin("metrics", day) for day in days]
    for attempt in attempts:
        attempt.write(metrics(attempt.ds.isoformat()))
    threads = [threading.Thread(target=attempt.commit) for attempt in attempts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lake.days("metrics") == days
    for day in days:
        assert lake.read("metrics", day)["metric"].to_pylist() == [day.isoformat()]


@pytest.mark.parametrize("_", range(20))  # a race: once in eight tries or so all meet
def test_two_first_writers_at_once_do_not_mix(lake: Lake, _: int) -> None:
    attempts = [Lake(lake.root).begin("metrics", DAY0) for _ in range(4)]
    for number, attempt in enumerate(attempts):
        attempt.write(metrics(f"writer {number}"))
    together = threading.Barrier(len(attempts))

    def commit(attempt: Attempt) -> type[BaseException] | None:
        together.wait()
        try:
            attempt.commit()
        except Exception as error:
            return type(error)
        return None

    with ThreadPoolExecutor(len(attempts)) as pool:
        ends = list(pool.map(commit, attempts))
    assert sorted(ends, key=str) == [ConflictError] * 3 + [None]
    winner = ends.index(None)
    assert lake.read("metrics", DAY0)["metric"].to_pylist() == [f"writer {winner}"]


def test_earlier_versions_can_be_read_and_restored(lake: Lake) -> None:
    digest = publish(lake, DAY0, "a")
    version = lake.history("metrics")[0]["version"]
    publish(lake, DAY0, "b")
    publish(lake, DAY1, "c")
    assert lake.read("metrics", DAY0, version=version)["metric"].to_pylist() == ["a"]
    assert lake.restore("metrics", DAY0, version).digest == digest
    assert lake.read("metrics", DAY0)["metric"].to_pylist() == ["a"]
    assert lake.read("metrics", DAY1)["metric"].to_pylist() == ["c"]
    with pytest.raises(LakeError, match="99"):
        lake.restore("metrics", DAY0, 99)


def test_orphans_go_and_published_files_stay(lake: Lake) -> None:
    publish(lake, DAY0, "a")
    publish(lake, DAY0, "b")
    killed = lake.begin("metrics", DAY0)
    killed.write(metrics("never"))
    assert lake.remove_orphans("metrics", dt.timedelta(hours=1)) == []
    assert lake.remove_orphans("metrics", dt.timedelta(0)) == [killed.folder]
    assert lake.read("metrics", DAY0, version=1)["metric"].to_pylist() == ["a"]


def test_other_columns_or_types_cannot_be_published(lake: Lake) -> None:
    wrong_type = metrics("a").set_column(4, "cases", pa.array([1.5]))
    extra = metrics("a").append_column("note", pa.array(["x"]))
    with lake.begin("metrics", DAY0) as attempt:
        with pytest.raises(LakeError, match="note"):
            attempt.write(extra)
        with pytest.raises(LakeError, match="metrics"):
            attempt.write(metrics("a").drop_columns("cases"))
    for table, told in ((wrong_type, "'cases' is double"), (extra, "unknown column 'note'")):
        with lake.begin("metrics", DAY0) as attempt:
            attempt.folder.mkdir(parents=True)
            pq.write_table(table, attempt.folder / "part-0.parquet")
            with pytest.raises(LakeError, match=told):
                attempt.commit()
    assert not lake.has("metrics", DAY0)


def test_a_corrupt_or_missing_file_is_named(lake: Lake) -> None:
    publish(lake, DAY0, "a")
    path = lake.partition("metrics", DAY0).files[0]
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(LakeError, match="corrupt parquet file") as error:
        lake.read("metrics", DAY0)
    assert str(path) in str(error.value)
    path.unlink()
    with pytest.raises(LakeError, match="the file is gone"):
        lake.read("metrics", DAY0)


def test_the_digest_is_of_the_rows_alone(lake: Lake) -> None:
    one = publish(lake, DAY0, "a", "b")
    with lake.begin("metrics", DAY1) as attempt:
        attempt.write(metrics("b"))
        attempt.write(metrics("a"))
        assert attempt.commit().digest == one
    assert publish(lake, DAY1, "a", "c") != one


def test_a_changed_input_makes_a_partition_stale(lake: Lake) -> None:
    publish(lake, DAY0, "a")
    reader = Lake(lake.root)
    reader.read("metrics", DAY0)
    publish(reader, DAY1, "b")
    assert lake.changed_inputs(lake.partition("metrics", DAY1)) == []
    publish(lake, DAY0, "a")  # the same rows again change nothing
    assert lake.changed_inputs(lake.partition("metrics", DAY1)) == []
    publish(lake, DAY0, "changed")
    assert lake.changed_inputs(lake.partition("metrics", DAY1)) == ["metrics@2026-03-02"]


def test_files_of_other_delta_writers_are_read(lake: Lake) -> None:
    from deltalake import write_deltalake

    table = metrics("theirs").append_column("ds", pa.array([DAY0], pa.date32()))
    write_deltalake(str(lake.folder("metrics")), table, partition_by=["ds"])
    assert lake.read("metrics", DAY0)["metric"].to_pylist() == ["theirs"]


def test_values_are_the_distinct_ones_of_a_column(lake: Lake) -> None:
    with lake.begin("raw_users", DAY0) as attempt:
        attempt.write(rows("raw_users", [{"user_id": "u1", "age": 30}, {"user_id": "u2"}]))
        attempt.write(rows("raw_users", [{"user_id": "u3", "age": 30}]))
        attempt.commit()
    assert lake.values("raw_users", DAY0, "age") == [30, None]
    with pytest.raises(LakeError, match="no partition"):
        lake.values("raw_users", DAY1, "age")
