"""Data-quality gates: contracts' expectations on staged rows, before anything is published.

`publish` is the one way to a published partition: write, audit, publish. Checks have a severity:
a failed critical check stops the publish, a failed warning only reports. A check that cannot be
run counts as critical. Results and Data Docs are kept for people.

Knows nothing of how the rows were made.
"""

from __future__ import annotations

import datetime as dt
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame, SparkSession

from leadre_lib.catalogue import Catalogue
from leadre_lib.contracts import Check
from leadre_lib.errors import LeadreError
from leadre_lib.lake import Attempt, Lake, Partition
from leadre_lib.settings import QualitySettings, Settings
from leadre_lib.spark import read_files, write

if TYPE_CHECKING:
    from great_expectations.data_context import AbstractDataContext

os.environ.setdefault("GX_ANALYTICS_ENABLED", "False")
log = logging.getLogger(__name__)
EXAMPLES = 5
MADE = pa.array(["model", "signals"])  # sources of candidates, but for what fills lists up
TRAILING_DAYS = 7
MEMORY = {"class_name": "InMemoryStoreBackend"}


class QualityError(LeadreError):
    """A critical check failed; the message names the table, the check and some of the rows."""


@dataclass(frozen=True)
class Outcome:
    """How one check came out. `failed` is empty text where it passed."""

    table: str
    check: Check
    failed: str

    @property
    def critical(self) -> bool:
        """Whether this outcome stops the publish."""
        return bool(self.failed) and self.check.severity == "critical"


def run_checks(
    frame: DataFrame, table: str, checks: Sequence[Check], settings: Settings, ds: dt.date
) -> list[Outcome]:
    """Run `checks` on `frame` with Great Expectations; keep the results for Data Docs.

    At first only yes or no is asked, which takes half the queries; then failures alone are asked
    for examples.
    """
    first = _validate(frame, table, list(checks), settings, ds, "BOOLEAN_ONLY")
    wrong = [number for number, result in enumerate(first) if not result.get("success")]
    again = _validate(frame, table, [checks[n] for n in wrong], settings, ds, "BASIC")
    reasons = dict(zip(wrong, map(_failure, again), strict=True))
    return [Outcome(table, check, reasons.get(n, "")) for n, check in enumerate(checks)]


def _validate(
    frame: DataFrame,
    table: str,
    checks: list[Check],
    settings: Settings,
    ds: dt.date,
    result_format: str,
) -> list[dict[str, Any]]:
    """The result of each check; an empty one where it is missing."""
    import great_expectations as gx
    from great_expectations import expectations as gxe
    from great_expectations.data_context.types.base import ProgressBarsConfig

    if not checks:
        return []
    context = gx_context(settings)
    # Progress bars are for notebooks; in a task's log they are noise.
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    source = context.data_sources.add_or_update_spark("leadre", persist=False)
    batch = source.add_dataframe_asset(table).add_batch_definition_whole_dataframe(ds.isoformat())
    suite = gx.ExpectationSuite(name=table)
    for number, check in enumerate(checks):
        expectation = getattr(gxe, _class_name(check.type))
        meta = {"check": number, "severity": check.severity}
        suite.add_expectation(expectation(**check.kwargs, meta=meta))
    definition = gx.ValidationDefinition(
        name=f"{table}-{ds}", data=batch, suite=context.suites.add_or_update(suite)
    )
    result = context.validation_definitions.add_or_update(definition).run(
        batch_parameters={"dataframe": frame},
        run_id=gx.RunIdentifier(run_name=ds.isoformat()),
        result_format={"result_format": result_format, "partial_unexpected_count": EXAMPLES},
    )
    found = {
        item["expectation_config"]["meta"]["check"]: item
        for item in result.to_json_dict()["results"]
    }
    return [found.get(number, {}) for number in range(len(checks))]


def gx_context(settings: Settings) -> AbstractDataContext:
    """A Great Expectations context whose results and Data Docs lie in the state folder.

    Only what people look at later is kept on disk; data sources live with the process, so that
    jobs side by side do not write one configuration file.
    """
    import great_expectations as gx
    from great_expectations.data_context.types.base import DataContextConfig

    def store(kind: str, folder: str) -> dict[str, Any]:
        backend = {
            "class_name": "TupleFilesystemStoreBackend",
            "base_directory": str(settings.state / "quality" / folder),
        }
        return {"class_name": kind, "store_backend": backend}

    config = DataContextConfig(
        expectations_store_name="expectations",
        validation_results_store_name="results",
        checkpoint_store_name="checkpoints",
        stores={
            "expectations": store("ExpectationsStore", "expectations"),
            "results": store("ValidationResultsStore", "results"),
            "checkpoints": {"class_name": "CheckpointStore", "store_backend": MEMORY},
            "validation_definition_store": {
                "class_name": "ValidationDefinitionStore",
                "store_backend": MEMORY,
            },
        },
        data_docs_sites={
            "site": {
                "class_name": "SiteBuilder",
                "show_how_to_buttons": False,
                "store_backend": {
                    "class_name": "TupleFilesystemStoreBackend",
                    "base_directory": str(settings.data_docs),
                },
            }
        },
        analytics_enabled=False,
    )
    return gx.get_context(mode="ephemeral", project_config=config)


def build_data_docs(settings: Settings) -> Path:
    """Build the Data Docs site from all kept results; the path of its first page."""
    gx_context(settings).build_data_docs()
    return settings.data_docs / "index.html"


def _class_name(type_: str) -> str:
    return "".join(part.capitalize() for part in type_.split("_"))


def _failure(result: dict[str, Any]) -> str:
    if not result:
        return "the check did not run"
    if result["success"]:
        return "failed once and then passed: the data changed under the check"
    raised = result.get("exception_info") or {}
    for info in [raised, *[v for v in raised.values() if isinstance(v, dict)]]:
        if info.get("raised_exception"):
            return f"the check could not be run: {str(info.get('exception_message'))[:300]}"
    details = result.get("result", {})
    if "unexpected_count" in details:
        some = details.get("partial_unexpected_list", [])[:EXAMPLES]
        return f"{details['unexpected_count']} of {details['element_count']} rows, such as {some}"
    return f"observed {details.get('observed_value')}"


def gate(outcomes: Sequence[Outcome]) -> None:
    """Log every failed check; raise `QualityError` if one of them is critical."""
    for outcome in outcomes:
        if outcome.failed:
            level = logging.ERROR if outcome.critical else logging.WARNING
            log.log(level, "%s: %s: %s", outcome.table, outcome.check.name, outcome.failed)
    if stops := [outcome for outcome in outcomes if outcome.critical]:
        lines = "\n  ".join(f"{o.table}: {o.check.name}: {o.failed}" for o in stops)
        raise QualityError(f"data-quality gate: nothing was published\n  {lines}")


def publish(
    spark: SparkSession,
    settings: Settings,
    lake: Lake,
    table: str,
    ds: dt.date,
    rows: DataFrame | pa.Table,
) -> Partition:
    """Write `rows` as an attempt, audit the written files, and publish them.

    Raises:
        LakeError, ConflictError: as `Attempt.commit` does.
        QualityError: a critical check of the contract failed; nothing was published.
    """
    with lake.begin(table, ds) as attempt:
        if isinstance(rows, pa.Table):
            attempt.write(rows)
        else:
            write(rows, attempt)
        audit(spark, settings, attempt)
        return attempt.commit()


def audit(spark: SparkSession, settings: Settings, attempt: Attempt) -> None:
    """Run the contract's checks on the files of an attempt. Raises `QualityError`."""
    contract = attempt.contract
    if not attempt.files:
        attempt.write(contract.arrow_schema().empty_table())
    frame = read_files(spark, attempt, contract)
    gate(run_checks(frame, contract.table, contract.checks(), settings, attempt.ds))


def volume(lake: Lake, table: str, ds: dt.date, settings: QualitySettings) -> Outcome:
    """A warning where a partition is much smaller or larger than the mean of the days before it.

    The table's first day does not count: it is an initial load, which holds a history.
    """
    check = Check("volume_against_trailing_days", {"ratio": settings.volume_ratio}, "warning")
    days = [day for day in lake.days(table)[1:] if day < ds][-TRAILING_DAYS:]
    before = [lake.partition(table, day).rows for day in days]
    usual = sum(before) / len(before) if before else 0.0
    if not usual:
        return Outcome(table, check, "")
    ratio = lake.partition(table, ds).rows / usual
    within = 1 / settings.volume_ratio <= ratio <= settings.volume_ratio
    return Outcome(table, check, "" if within else f"{ratio:.2f} times the trailing days' rows")


def candidate_outcomes(
    candidates: pa.Table,
    catalogue: Catalogue,
    active_users: int,
    earlier: pa.Table | None,
    settings: QualitySettings,
) -> list[Outcome]:
    """What a column cannot show: stopped ads, coverage of users, a silent model, score drift."""
    rows = catalogue.ad_rows(candidates["ad_id"])
    stopped = int((~np.where(rows >= 0, catalogue.active[rows], False)).sum())
    # What fills lists up finds something for anybody: it would hide a night that finds nothing.
    told = candidates.filter(pc.is_in(candidates["source"], MADE))
    covered = pc.count_distinct(told["user_id"]).as_py() / max(1, active_users)
    outcomes = [
        Outcome(
            "candidates",
            Check("every_ad_is_active", {}, "critical"),
            f"{stopped} rows name an ad that is unknown or not active" if stopped else "",
        ),
        Outcome(
            "candidates",
            Check("coverage_of_active_users", {}, "critical"),
            f"something was found for {covered:.2%} of {active_users} active users, less than"
            f" quality.min_candidate_coverage = {settings.min_candidate_coverage:.2%}"
            if covered < settings.min_candidate_coverage
            else "",
        ),
        Outcome(
            "candidates",
            # With the fusion, popular objects compete for everybody: they too would hide it.
            Check("the_model_is_heard", {}, "warning"),
            ""
            if pc.any(pc.equal(candidates["source"], "model")).as_py()
            else "no candidate was written by the model: look at the log of `infer`",
        ),
    ]
    scores = [_model_scores(rows) for rows in (candidates, earlier) if rows is not None]
    if len(scores) == 2 and all(map(len, scores)):
        drift = pc.mean(scores[0]).as_py() - pc.mean(scores[1]).as_py()
        limit = settings.max_score_drift
        failed = f"the mean score moved by {drift:.2f}" if abs(drift) > limit else ""
        outcomes.append(Outcome("candidates", Check("score_drift", {}, "warning"), failed))
    return outcomes


def _model_scores(candidates: pa.Table) -> pa.ChunkedArray:
    """The log-probabilities among the scores."""
    return candidates.filter(pc.equal(candidates["source"], "model"))["score"]
