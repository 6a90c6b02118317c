"""Both Spark engines give equal rows, each through the real jobs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from leadre_lib.errors import LeadreError
from leadre_lib.settings import REPOSITORY
from leadre_lib.spark import check_java


def digests(engine: str, home: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.jobs.data_jobs", engine, str(home)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_equal_rows_on_both_engines(tmp_path: Path) -> None:
    check_java()
    sail, spark = (digests(engine, tmp_path / engine) for engine in ("sail", "spark"))
    expected = {"ads", "behaviours", "eval_examples", "preference_pairs", "quarantine"}
    expected |= {"sft_examples", "user_interests", "user_prompts", "users", "ad_semantic_ids"}
    expected |= {"synthetic_histories"}
    assert set(sail) == expected | {"user_prompts_zh", "scenes"}
    assert sail["user_prompts_zh"] != sail["user_prompts"]
    assert sail["scenes"]
    assert sail == spark


@pytest.mark.parametrize("version", ["", "11", "23"])
def test_without_the_right_java_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    if version:
        java = tmp_path / "bin" / "java"
        java.parent.mkdir()
        java.write_text(f"#!/bin/sh\necho 'openjdk version \"{version}.0.1\"' >&2\n")
        java.chmod(0o755)
        monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    else:
        monkeypatch.delenv("JAVA_HOME", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LeadreError, match="openjdk-17-jre-headless") as error:
        check_java()
    assert "\n" not in str(error.value)
    assert (version or "none") in str(error.value)
    assert os.environ["PATH"]
