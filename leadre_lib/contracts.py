"""Data contracts: one Open Data Contract Standard v3 file a table in `schemas/`.

A contract is the single source of a table's columns, types, keys and checks; the PyArrow schema,
the Spark schema and the Great Expectations suite derive from it.
Standard: https://bitol-io.github.io/open-data-contract-standard/v3.2.0/

Knows nothing of where tables lie or of how checks are run.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import pyarrow as pa
import yaml

from leadre_lib.errors import LeadreError
from leadre_lib.settings import REPOSITORY

if TYPE_CHECKING:
    from pyspark.sql.types import DataType, StructType

PARTITION = "ds"
RAW_TABLES = ("raw_users", "raw_ads", "raw_ad_events", "raw_content_events")
FOLDER = REPOSITORY / "schemas"

# physicalType → the name that Arrow and Spark SQL know it by
ARROW_TYPES: dict[str, pa.DataType] = {
    "string": pa.string(),
    "int": pa.int32(),
    "bigint": pa.int64(),
    "double": pa.float64(),
    "boolean": pa.bool_(),
    "date": pa.date32(),
    "timestamp": pa.timestamp("us", "UTC"),
}
KEY_TYPES = {"string", "int", "bigint", "date"}
SEVERITIES = {"critical", "warning"}


class ContractError(LeadreError):
    """A contract is missing or malformed; the message names the file and the place."""


@dataclass(frozen=True)
class Check:
    """One expectation of a table: a Great Expectations type, its arguments and its severity."""

    type: str
    kwargs: dict[str, Any]
    severity: str

    @property
    def name(self) -> str:
        """A short text by which people know the check."""
        columns = self.kwargs.get("column") or self.kwargs.get("column_list") or ""
        return f"{self.type}({columns})" if columns else self.type


@dataclass(frozen=True)
class Contract:
    """The contract of one table, validated. Build it with `load_contract`."""

    table: str
    properties: tuple[dict[str, Any], ...]
    table_quality: tuple[dict[str, Any], ...]

    @property
    def columns(self) -> list[str]:
        """The columns that data files hold: all but the partition column, in order."""
        return [p["name"] for p in self.properties if p["name"] != PARTITION]

    @property
    def key(self) -> list[str]:
        """The columns that identify a row within a partition; empty where rows may repeat."""
        keyed = [p for p in self.properties if p.get("primaryKey")]
        return [p["name"] for p in sorted(keyed, key=lambda p: p["primaryKeyPosition"])]

    def arrow_schema(self, partition: bool = False) -> pa.Schema:
        """The PyArrow schema of a data file; with `partition`, the table's, `ds` included.

        Every field is nullable, as Spark writes it; nulls are the checks' business.
        """
        return pa.schema(
            [
                pa.field(p["name"], _arrow_type(p))
                for p in self.properties
                if partition or p["name"] != PARTITION
            ]
        )

    def spark_schema(self) -> StructType:
        """The Spark schema of a data file, `ds` left out."""
        from pyspark.sql.types import StructField, StructType

        return StructType(
            [
                StructField(p["name"], _spark_type(p))
                for p in self.properties
                if p["name"] != PARTITION
            ]
        )

    def checks(self) -> list[Check]:
        """The expectations that the contract states, for columns first, then for the table."""
        result: list[Check] = []
        for item in self.properties:
            if item["name"] != PARTITION:
                result += _column_checks(item)
        if len(self.key) == 1:
            result.append(
                Check("expect_column_values_to_be_unique", {"column": self.key[0]}, "critical")
            )
        elif self.key:
            kwargs = {"column_list": self.key}
            result.append(Check("expect_compound_columns_to_be_unique", kwargs, "critical"))
        result += [_quality_check(rule, None) for rule in self.table_quality]
        return result


def _arrow_type(item: dict[str, Any]) -> pa.DataType:
    if item["logicalType"] == "array":
        return pa.list_(_arrow_type(item["items"]))
    if item["logicalType"] == "object":
        return pa.struct([pa.field(p["name"], _arrow_type(p)) for p in item["properties"]])
    return ARROW_TYPES[item["physicalType"]]


def _spark_type(item: dict[str, Any]) -> DataType:
    from pyspark.sql import types as T

    if item["logicalType"] == "array":
        return T.ArrayType(_spark_type(item["items"]))
    if item["logicalType"] == "object":
        return T.StructType([T.StructField(p["name"], _spark_type(p)) for p in item["properties"]])
    return {
        "string": T.StringType(),
        "int": T.IntegerType(),
        "bigint": T.LongType(),
        "double": T.DoubleType(),
        "boolean": T.BooleanType(),
        "date": T.DateType(),
        "timestamp": T.TimestampType(),
    }[item["physicalType"]]


def _column_checks(item: dict[str, Any]) -> list[Check]:
    column = item["name"]
    options = item.get("logicalTypeOptions", {})
    result: list[Check] = []
    if item.get("required"):
        result.append(Check("expect_column_values_to_not_be_null", {"column": column}, "critical"))
    if item.get("unique"):
        result.append(Check("expect_column_values_to_be_unique", {"column": column}, "critical"))
    if {"minimum", "maximum"} & options.keys():
        kwargs = {
            "column": column,
            "min_value": options.get("minimum"),
            "max_value": options.get("maximum"),
        }
        result.append(Check("expect_column_values_to_be_between", kwargs, "critical"))
    if {"minLength", "maxLength"} & options.keys():
        kwargs = {
            "column": column,
            "min_value": options.get("minLength"),
            "max_value": options.get("maxLength"),
        }
        result.append(Check("expect_column_value_lengths_to_be_between", kwargs, "critical"))
    return result + [_quality_check(rule, column) for rule in item.get("quality", [])]


def _quality_check(rule: dict[str, Any], column: str | None) -> Check:
    severity = rule["severity"]
    if rule.get("type") == "custom":
        implementation = rule["implementation"]
        kwargs = dict(implementation.get("kwargs", {}))
        if column:
            kwargs["column"] = column
        return Check(implementation["type"], kwargs, severity)
    if rule["metric"] == "rowCount":
        minimum = rule["mustBeGreaterThan"] + 1
        return Check("expect_table_row_count_to_be_between", {"min_value": minimum}, severity)
    kwargs = {"column": column, "value_set": rule["arguments"]["validValues"]}
    return Check("expect_column_values_to_be_in_set", kwargs, severity)


@functools.cache
def _standard() -> jsonschema.protocols.Validator:
    text = resources.files("open_data_contract_standard").joinpath("schema.json").read_text("utf-8")
    schema = json.loads(text)
    return jsonschema.validators.validator_for(schema)(schema)


def _check_property(path: Path, item: dict[str, Any], where: str) -> None:
    """What the standard leaves open and this project needs: a type that it knows, everywhere."""
    logical = item.get("logicalType")
    if logical == "array":
        if "items" not in item:
            raise ContractError(f"{path}: {where}: an array needs `items` with a type")
        _check_property(path, item["items"], f"{where}.items")
    elif logical == "object":
        if not item.get("properties"):
            raise ContractError(f"{path}: {where}: an object needs `properties`")
        for child in item["properties"]:
            _check_property(path, child, f"{where}.{child['name']}")
    elif item.get("physicalType") not in ARROW_TYPES:
        known = ", ".join(ARROW_TYPES)
        raise ContractError(
            f"{path}: {where}: physicalType {item.get('physicalType')!r} is not one of {known}"
        )
    if item.get("primaryKey") and item.get("physicalType") not in KEY_TYPES:
        raise ContractError(f"{path}: {where}: a {item.get('physicalType')} cannot be a key")


def _check_quality(path: Path, rules: list[dict[str, Any]], where: str) -> None:
    for rule in rules:
        if rule.get("severity") not in SEVERITIES:
            raise ContractError(f"{path}: {where}: severity must be critical or warning")
        known = (
            (rule.get("type") == "custom" and rule.get("engine") == "great-expectations")
            or (rule.get("metric") == "rowCount" and "mustBeGreaterThan" in rule)
            or (rule.get("metric") == "invalidValues" and "arguments" in rule)
        )
        if not known:
            raise ContractError(f"{path}: {where}: this kind of quality rule is not supported")


def read_contract(path: Path) -> Contract:
    """Read and validate one contract file.

    Raises:
        ContractError: the file is missing, is not what the standard allows, or leaves out
            something that a table needs; the message names the file and the place.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ContractError(f"{path}: no such contract; every table needs one") from None
    except yaml.YAMLError as error:
        raise ContractError(f"{path}: not valid YAML: {error}") from None
    wrong = sorted(_standard().iter_errors(document), key=lambda e: list(map(str, e.path)))
    if wrong:
        place = ".".join(str(part) for part in wrong[0].absolute_path) or "top level"
        raise ContractError(f"{path}: {place}: {wrong[0].message[:300]}")
    if not document.get("schema"):
        raise ContractError(f"{path}: `schema` is empty: it must describe the table")
    schema = document["schema"][0]
    table = path.name.removesuffix(".odcs.yaml")
    if schema["name"] != table:
        raise ContractError(f"{path}: describes {schema['name']!r}, but the file name says {table}")
    properties = schema.get("properties", [])
    for item in properties:
        _check_property(path, item, item["name"])
        _check_quality(path, item.get("quality", []), item["name"])
    _check_quality(path, schema.get("quality", []), table)
    partition = [item for item in properties if item["name"] == PARTITION]
    if not partition or partition[0]["physicalType"] != "date":
        raise ContractError(f"{path}: needs a column `ds` of type date, the partition")
    return Contract(table, tuple(properties), tuple(schema.get("quality", [])))


@functools.cache
def load_contract(table: str, folder: Path = FOLDER) -> Contract:
    """The contract of `table`. Raises `ContractError` as `read_contract` does."""
    return read_contract(folder / f"{table}.odcs.yaml")


def tables(folder: Path = FOLDER) -> list[str]:
    """The names of all tables that have a contract."""
    return sorted(path.name.removesuffix(".odcs.yaml") for path in folder.glob("*.odcs.yaml"))
