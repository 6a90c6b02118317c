"""Shared fixtures: settings on a home of their own, and one Sail session for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from leadre_lib.lake import Lake
from leadre_lib.settings import Settings, load_settings
from leadre_lib.spark import session

for name in [name for name in os.environ if name.startswith("LEADRE_")]:
    del os.environ[name]  # the shell's settings are not the tests' business


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """The local profile with a home of its own."""
    return load_settings(home=tmp_path / "home")


@pytest.fixture
def lake(settings: Settings) -> Lake:
    """An empty lake."""
    return Lake(settings.lake)


@pytest.fixture(scope="session")
def spark() -> Iterator[SparkSession]:
    """The one Sail session."""
    with session(load_settings(engine="sail")) as opened:
        yield opened
