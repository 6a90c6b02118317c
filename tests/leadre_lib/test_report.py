"""The day's page, from what trainings leave behind."""

from __future__ import annotations

import datetime as dt
import json
import re
from pathlib import Path

from leadre_lib.report import kept_weights, training_curves, write_report
from leadre_lib.settings import Settings

DS = dt.date(2026, 3, 3)


def write(settings: Settings, stage: str, name: str, points: list[dict[str, float]]) -> None:
    folder = settings.work(DS) / stage
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(points))


def test_the_page_shows_the_validation_curve_and_what_was_kept(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    assert training_curves(settings, DS) == ""
    assert kept_weights(settings, DS) is None
    write(settings, "sft", "loss", [{"step": n, "loss": 5.0 / n} for n in range(1, 9)])
    write(settings, "dpo", "loss", [{"step": n, "loss": 1.0 / n} for n in range(1, 4)])
    without = training_curves(settings, DS)
    assert "HR@10" not in without
    hits = {2: 0.125, 4: 0.375, 6: 0.25}
    curve = [
        {"step": step, "HR@10": hit, "NDCG@10": hit / 2, "kept": hit == max(hits.values())}
        for step, hit in hits.items()
    ]
    write(settings, "sft", "validation", curve)
    picture = training_curves(settings, DS)
    titles = re.findall(r">((?:SFT|DPO) [a-z]+)<", picture)
    assert titles == ["SFT loss", "SFT validation", "DPO loss"]
    assert picture.count("#a33b00") > without.count("#a33b00") == 0
    page = write_report(settings, DS, []).read_text()
    assert picture in page
    said = re.sub(r"\s+", " ", page)
    assert "validated 3 times by decoding; the weights of step 4 (marked) were kept" in said
    assert "HR@10 0.3750, NDCG@10 0.1875" in said


def test_a_day_without_validation_says_nothing_of_it(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    write(settings, "sft", "loss", [{"step": 1, "loss": 5.0}])
    page = write_report(settings, DS, []).read_text()
    assert "SFT loss" in page
    assert "validated" not in page
