"""Contracts: the shipped ones are sound, and mistakes in one are named."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
import yaml

from leadre_lib.contracts import ContractError, load_contract, read_contract, tables


def test_every_table_has_a_sound_contract() -> None:
    assert len(tables()) == 18
    for name in tables():
        contract = load_contract(name)
        assert contract.spark_schema().names == contract.columns
        assert contract.arrow_schema(partition=True).field("ds").type == pa.date32()
        assert {check.severity for check in contract.checks()} <= {"critical", "warning"}


def test_types_and_checks_derive_from_the_contract() -> None:
    contract = load_contract("user_interests")
    long_term = contract.arrow_schema().field("long_term").type
    assert long_term.value_type.field("times").type == pa.int32()
    types = contract.spark_schema()["long_term"].dataType.simpleString()
    assert types == "array<struct<category:string,times:int,score:double>>"
    checks = {(c.type, str(c.kwargs.get("column"))) for c in contract.checks()}
    assert ("expect_column_values_to_be_unique", "user_id") in checks
    assert ("expect_column_values_to_not_be_null", "long_term") in checks


def _broken(tmp_path: Path, change: str) -> Path:
    path = Path("schemas/candidates.odcs.yaml")
    document = yaml.safe_load((Path(__file__).parents[2] / path).read_text())
    schema = document["schema"][0]
    column = schema["properties"][1]
    del column["logicalTypeOptions"]
    if change == "typo":
        column["requried"] = True
    elif change == "empty":
        document["schema"] = []
    elif change == "float key":
        column |= {"physicalType": "double", "logicalType": "number"}
    elif change == "no zone":
        column["physicalType"] = "timestamp_ntz"
    elif change == "array":
        column |= {"logicalType": "array"}
    elif change == "severity":
        schema["quality"][0]["severity"] = "fatal"
    elif change == "partition":
        schema["properties"] = schema["properties"][:-1]
    target = tmp_path / path.name
    target.write_text(yaml.safe_dump(document))
    return target


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("typo", "requried"),
        ("empty", "schema"),
        ("float key", "cannot be a key"),
        ("no zone", "timestamp_ntz"),
        ("array", "items"),
        ("severity", "severity"),
        ("partition", "ds"),
    ],
)
def test_a_broken_contract_is_refused(tmp_path: Path, change: str, told: str) -> None:
    path = _broken(tmp_path, change)
    with pytest.raises(ContractError, match=told) as error:
        read_contract(path)
    assert str(path) in str(error.value)


def test_a_table_without_contract_is_refused() -> None:
    with pytest.raises(ContractError, match="no such contract"):
        load_contract("dreams")
