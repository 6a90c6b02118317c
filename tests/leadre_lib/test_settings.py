"""Settings: precedence, and errors that name what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from leadre_lib.settings import SettingsError, load_settings


def test_environment_goes_over_profile_and_source(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert load_settings(source="movielens").interests.window_days == 365
    monkeypatch.setenv("LEADRE_INTERESTS__WINDOW_DAYS", "7")
    monkeypatch.setenv("LEADRE_HOME", str(tmp_path))
    settings = load_settings(source="movielens")
    assert settings.interests.window_days == 7
    assert settings.lake == tmp_path / "movielens" / "lake"


def test_a_section_within_a_section_has_variables_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEADRE_EXAMPLES__TASK_WEIGHTS__SID_TO_TEXT", "0")
    weights = load_settings().examples.task_weights
    assert weights.sid_to_text == 0
    assert weights.next_ad == 2


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("LEADRE_ENGNE", "spark", "LEADRE_ENGNE"),
        ("LEADRE_SFT__EPOCH", "2", "LEADRE_SFT__EPOCH"),
        ("LEADRE_SFT__EPOCHS__MANY", "2", "LEADRE_SFT__EPOCHS__MANY"),
        ("LEADRE_EXAMPLES__TASK_WEIGHTS__RIDDLE", "1", "LEADRE_EXAMPLES__TASK_WEIGHTS__RIDDLE"),
        ("LEADRE_SFT__EPOCHS", "none", "sft.epochs"),
        ("LEADRE_ENGINE", "flink", "engine"),
        ("LEADRE_PROFILE", "moon", "moon"),
    ],
)
def test_unknown_or_bad_settings_are_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, told: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=told):
        load_settings()


@pytest.mark.parametrize("profile", ["local", "cluster"])
def test_every_profile_loads(profile: str) -> None:
    assert load_settings(profile=profile).profile == profile
