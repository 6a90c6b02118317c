"""The command that shows a user's prompt: the text, what its parts take, and what goes wrong."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import curate, interests, prompt
from leadre_lib.budget import measure
from leadre_lib.errors import LeadreError
from leadre_lib.lake import Lake
from leadre_lib.model import build_model, build_tokenizer, save, sid_tokens
from leadre_lib.release import Releases
from leadre_lib.settings import REPOSITORY, Settings, load_settings
from leadre_lib.templates import parse
from tests.worlds import DAY0, DAY1, assign_ids, at, land

LENIENT = {"max_duplicate_event_rate": 1.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with two curated days and the nightly prompts of the second."""
    home = tmp_path_factory.mktemp("prompt") / "home"
    settings = load_settings(home=home, quality=LENIENT)
    lake = Lake(settings.lake)
    for ds in (DAY0, DAY1):
        land(lake, ds)
        curate.run(argparse.Namespace(ds=ds), settings)
        assign_ids(lake, ds)
    interests.run(argparse.Namespace(ds=DAY1), settings)
    return home


@pytest.fixture
def settings(base: Path, tmp_path: Path) -> Settings:
    """The world above, to be changed at will."""
    shutil.copytree(base, tmp_path / "home")
    return load_settings(home=tmp_path / "home")


def show(settings: Settings, user: str, when: str = "", titles: bool = False) -> None:
    moment = prompt.moment(when) if when else None
    prompt.run(argparse.Namespace(user_id=user, at=moment, titles=titles), settings)


def nightly(settings: Settings, user: str) -> str:
    rows = Lake(settings.lake).read("user_prompts", DAY1).to_pylist()
    return next(row["prompt"] for row in rows if row["user_id"] == user)


def crown(settings: Settings, template: str = "en-1") -> Releases:
    """Make a release the champion whose tokenizer knows the nightly prompts."""
    prompts = Lake(settings.lake).read("user_prompts", DAY1)["prompt"].to_pylist()
    tokenizer = build_tokenizer(prompts, sid_tokens([4, 1]), 300)
    folder = settings.home / "model"
    save(build_model(settings.model, tokenizer, 1), tokenizer, folder)
    releases = Releases(settings.releases)
    told = {"versions": {"codebook": "plain", "template": template}, "metrics": {}}
    releases.promote(DAY1, releases.build(DAY1, {"model": folder}, told).id, "made by hand")
    return releases


def sizes(out: str) -> dict[str, int]:
    """The table of what each part takes."""
    return {part: int(size) for part, size in re.findall(r"│ (\S+) +│ +(\d+) │", out)}


def test_it_is_the_nightly_prompt_unless_a_moment_is_given(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    show(settings, "u1")
    out = capsys.readouterr().out
    told = nightly(settings, "u1")
    assert told in out
    assert "at 2026-03-04 00:00 UTC" in out
    assert "no champion yet" in out
    assert sizes(out)["total"] == len(told)
    assert sum(sizes(out).values()) == 2 * len(told)
    show(settings, "u1", "2026-03-02T08:30")
    early = capsys.readouterr().out
    assert "Recent behaviours: 0*play*My first marathon; 0*click*<a_0><b_0>.\n" in early
    show(settings, "u1", "2026-03-02T09:30+01:00", titles=True)
    assert capsys.readouterr().out.count("0*click*Trail running shoes.\n") == 1
    # Of what arrives late only what had arrived by then: e13, of the evening, came the day after.
    show(settings, "u2", "2026-03-03")
    assert "0*click" not in (midnight := capsys.readouterr().out)
    assert "<a_2>" not in midnight
    show(settings, "u2", "2026-03-03T00:01")
    assert "1*click*<a_2><b_0>.\n" in capsys.readouterr().out


def test_each_part_is_told_with_its_tokens(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    crown(settings)
    show(settings, "u1")
    out = capsys.readouterr().out
    told = sizes(out)
    assert list(told) == ["role", "profile", "short-term", "long-term", "question", "total"]
    total = told.pop("total")
    assert sum(told.values()) == total
    assert min(told.values()) > 0
    assert f"The limit is {settings.model.max_tokens - 2} tokens; dropped over it: nothing" in out
    assert "was trained with" not in out


def test_what_the_budget_drops_is_told(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    releases = crown(settings, template="en-0")
    from leadre_lib.model import load_tokenizer

    tokenizer = load_tokenizer(releases.champion().model)
    text = nightly(settings, "u1")
    limit = len(tokenizer(text)["input_ids"]) - 1
    dropped = int(measure([text], tokenizer, limit).behaviours[0])
    assert dropped >= 1
    show(load_settings(home=settings.home, model={"max_tokens": limit + 2}), "u1")
    out = " ".join(capsys.readouterr().out.split())
    assert f"dropped over it: {'; '.join(parse(text).behaviours[:dropped])}" in out
    assert "trained with template en-0, this prompt is written with en-1" in out
    show(load_settings(home=settings.home, model={"max_tokens": 30}), "u1")
    assert "are cut on the left" in capsys.readouterr().out


def test_other_words_are_the_settings_business(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    chinese = load_settings(home=settings.home, prompt={"language": "zh", "profile": False})
    show(chinese, "u1")
    out = capsys.readouterr().out
    assert "你是一个广告推荐系统。\n最近行为：" in out
    assert "profile" not in sizes(out)


def test_who_and_when_that_there_are_not(settings: Settings) -> None:
    with pytest.raises(LeadreError, match=r"'nobody' is not among .* such as u1, u2, u3"):
        show(settings, "nobody")
    with pytest.raises(LeadreError, match=r"no behaviours at 2026-03-02 07:00 UTC, .* 07:00"):
        show(settings, "u1", "2026-03-02T07:00")
    with pytest.raises(LeadreError, match="ask for a later --at"):
        show(settings, "u1", "2020-01-01")
    empty = load_settings(home=settings.home / "elsewhere")
    with pytest.raises(LeadreError, match="nothing is published yet"):
        show(empty, "u1")


@pytest.mark.parametrize("when", ["yesterday", "2026-13-01", "12:00", ""])
def test_what_is_no_moment_is_refused(tmp_path: Path, when: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jobs.prompt", "u1", "--at", when],
        cwd=REPOSITORY,
        env={**os.environ, "LEADRE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert f"{when!r} is no moment: write it as YYYY-MM-DD" in done.stderr


def test_a_moment_without_zone_is_in_utc() -> None:
    assert prompt.moment("2026-03-02T12:00") == at(DAY0, 12)
    assert prompt.moment("2026-03-02T12:00+02:00") == at(DAY0, 10)
    assert prompt.moment("2026-03-02") == at(DAY0, 0)
