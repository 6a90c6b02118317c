"""Rules of the house that a reader would otherwise have to remember."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

from leadre_lib.contracts import tables

ROOT = Path(__file__).parent.parent
FLOORS: list[set[str]] = [
    {"settings", "errors", "contracts", "lake", "release", "facts", "templates"},
    {
        "sources",
        "spark",
        "curation",
        "interests",
        "prompts",
        "budget",
        "embeddings",
        "quantisers",
        "semantic_ids",
        "catalogue",
        "constraint_index",
        "model",
        "transformer",
    },
    {
        "alignment",
        "packing",
        "signals",
        "fusion",
        "preferences",
        "preference_rank",
        "rank_model",
        "beam_pairs",
        "training",
        "training_rank",
        "decoding",
        "vllm_decoder",
        "generation",
        "assignment",
        "candidates",
        "inference",
        "retrieval",
        "synthetic",
        "indexes",
        "evaluation",
        "sasrec",
        "comparison",
        "quality",
    },
    {"online_store", "report"},
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
MODULES = sorted((ROOT / "leadre_lib").rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Dotted names of everything that a file imports, wherever it does so."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_floors_import_downwards_only(path: Path) -> None:
    own = path.relative_to(ROOT / "leadre_lib").parts[0].removesuffix(".py")
    names = imports(path)
    assert not [n for n in names if n.split(".")[0] in {"airflow", "jobs", "dags"}]
    if own != "__init__":
        used = {n.split(".")[1] for n in names if n.startswith("leadre_lib.")}
        assert not {n for n in used if n in FLOOR and FLOOR[n] > FLOOR[own]}


def test_every_module_has_a_floor_and_says_what_it_does() -> None:
    for path in MODULES:
        own = path.relative_to(ROOT / "leadre_lib").parts[0].removesuffix(".py")
        assert own in FLOOR or own == "__init__", f"{own} has no floor"
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_pyspark_and_its_client_are_of_one_version() -> None:
    pins = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", (ROOT / "requirements.txt").read_text(), re.M))
    assert pins["pyspark"] == pins["pyspark-client"]
    assert pins["torch"] == "2.13.0"
    assert "://" not in (ROOT / "requirements.txt").read_text()


def test_every_direct_dependency_has_its_reason_and_its_pin() -> None:
    pins = (ROOT / "requirements.txt").read_text()
    for line in (ROOT / "requirements.in").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        name, _, reason = line.partition("#")
        assert reason.strip(), line
        package = re.split(r"[=<>, ]", name)[0].lower()
        assert re.search(rf"^{package}==", pins, re.M), line


def test_contract_files_are_named_after_their_tables() -> None:
    for name in tables():
        document = yaml.safe_load((ROOT / "schemas" / f"{name}.odcs.yaml").read_text())
        assert document["id"] == f"leadre.{name}"
