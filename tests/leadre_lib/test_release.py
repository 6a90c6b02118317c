"""Releases: immutable, checked on opening, one champion a day that backfills do not disturb."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path

import pytest

from leadre_lib.release import Release, ReleaseError, Releases

DAYS = [dt.date(2026, 3, 2) + dt.timedelta(days=n) for n in range(4)]


def build(root: Path, ds: dt.date, weights: str = "w", template: str = "en-1") -> Release:
    source = root.parent / f"source-{ds}-{weights}"
    (source / "model").mkdir(parents=True, exist_ok=True)
    (source / "model" / "model.safetensors").write_text(weights)
    (source / "ids.json").write_text("[]")
    parts = {"model": source / "model", "semantic_ids/ids.json": source / "ids.json"}
    versions = {"codebook": "book", "template": template}
    return Releases(root).build(ds, parts, {"versions": versions, "metrics": {}})


def test_what_lists_are_fused_by_is_part_of_a_release(tmp_path: Path) -> None:
    model = tmp_path / "model.safetensors"
    model.write_bytes(b"w")
    releases = Releases(tmp_path / "releases")
    made = [
        releases.build(DAYS[0], {"model.safetensors": model}, {"fusion": {"taken": taken}})
        for taken in (1.0, 1.0, 9.0)
    ]
    assert made[0].id == made[1].id != made[2].id
    assert made[2].manifest["fusion"] == {"taken": 9.0}


def test_equal_content_is_the_same_release(tmp_path: Path) -> None:
    root = tmp_path / "releases"
    one = build(root, DAYS[0])
    assert build(root, DAYS[0]).id == one.id
    assert build(root, DAYS[0], "other").id != one.id
    assert sorted(p.name for p in root.iterdir() if p.is_dir()) == sorted(
        {one.id, build(root, DAYS[0], "other").id}
    )


@pytest.mark.parametrize("harm", ["truncated", "swapped", "missing", "extra"])
def test_a_damaged_release_is_refused_with_the_file(tmp_path: Path, harm: str) -> None:
    release = build(tmp_path / "releases", DAYS[0])
    weights = release.folder / "model" / "model.safetensors"
    if harm == "truncated":
        weights.write_text("")
    elif harm == "swapped":
        weights.write_text("x")
    elif harm == "missing":
        weights.unlink()
    else:
        weights = release.folder / "extra.json"
        weights.write_text("{}")
    with pytest.raises(ReleaseError, match=str(weights)):
        Releases(tmp_path / "releases").open(release.id)


def test_pickles_and_other_files_do_not_get_into_a_release(tmp_path: Path) -> None:
    bad = tmp_path / "optimizer.pt"
    bad.write_bytes(b"x")
    with pytest.raises(ReleaseError, match=r"optimizer\.pt"):
        Releases(tmp_path / "releases").build(DAYS[0], {"optimizer.pt": bad}, {})
    assert not list((tmp_path / "releases").iterdir())


def test_another_codebook_is_refused(tmp_path: Path) -> None:
    release = build(tmp_path / "releases", DAYS[0])
    release.require_codebook("book", "this table")
    with pytest.raises(ReleaseError, match="that table was made with codebook other"):
        release.require_codebook("other", "that table")


def test_another_template_is_refused(tmp_path: Path) -> None:
    release = build(tmp_path / "releases", DAYS[0])
    release.require_template("en-1", "this table")
    with pytest.raises(ReleaseError, match=r"that table was .* zh-1, but .* with en-1: set prompt"):
        release.require_template("zh-1", "that table")
    other = build(tmp_path / "releases", DAYS[0], template="zh-1")
    assert other.id != release.id
    other.require_template("zh-1", "that table")
    (other.folder / "manifest.json").write_text(
        json.dumps(other.manifest | {"versions": {"codebook": "book"}})
    )
    with pytest.raises(ReleaseError, match="with unknown"):
        Releases(tmp_path / "releases").open(other.id).require_template("zh-1", "that table")


def test_a_day_reads_the_champion_before_it_and_a_backfill_moves_nothing(tmp_path: Path) -> None:
    releases = Releases(tmp_path / "releases")
    assert releases.champion() is None
    ids = [build(releases.root, day, str(n)).id for n, day in enumerate(DAYS)]
    for day, release_id in zip(DAYS[1:], ids[1:], strict=True):
        releases.promote(day, release_id, "better")
    before = releases.champion(before=DAYS[2])
    assert before is not None
    assert before.id == ids[1]
    assert releases.champion(before=DAYS[1]) is None
    # An old day again, with another result: today's champion stays.
    releases.promote(DAYS[1], ids[0], "redone")
    champion = releases.champion()
    assert champion is not None
    assert champion.id == ids[3]
    releases.withdraw(DAYS[3])
    champion = releases.champion()
    assert champion is not None
    assert champion.id == ids[2]


def test_a_rebuild_follows_its_day_and_a_redone_day_replaces_it(tmp_path: Path) -> None:
    releases = Releases(tmp_path / "releases")
    daily, child = (build(releases.root, DAYS[1], name).id for name in ("daily", "child"))
    releases.promote(DAYS[1], daily, "better")
    releases.promote(DAYS[1], child, "rebuilt", rebuild=True)
    assert [(e.release, e.sequence) for e in releases.history()] == [(daily, 0), (child, 1)]
    entry = releases.champion_entry()
    assert entry is not None
    assert entry.release == child
    releases.promote(DAYS[1], daily, "again")
    assert [e.release for e in releases.history()] == [daily]


def test_a_damaged_pointer_is_named(tmp_path: Path) -> None:
    releases = Releases(tmp_path / "releases")
    releases.promote(DAYS[0], build(releases.root, DAYS[0]).id, "first")
    path = releases.root / "champion.json"
    path.write_text(json.dumps([{"ds": "2026-03-02"}]))
    with pytest.raises(ReleaseError, match=r"champion\.json"):
        releases.champion()
