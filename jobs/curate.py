"""Curate a day: the snapshots of users and ads, and one behaviour stream of both domains.

Repeated event ids are dropped and counted. Events that name unknown users or ads, or that lie in
the future, go to `quarantine` with the reason; more of them than
`quality.max_unknown_reference_rate` stop the day.
"""

from __future__ import annotations

import argparse
import datetime as dt

from pyspark.sql import SparkSession

from jobs.command import main, parser
from leadre_lib import facts
from leadre_lib.curation import ECPM_DAYS, curate_ads, curate_events
from leadre_lib.lake import Lake
from leadre_lib.quality import QualityError, publish
from leadre_lib.settings import Settings
from leadre_lib.spark import read, session


def publish_ads(spark: SparkSession, settings: Settings, lake: Lake, ds: dt.date) -> None:
    """Publish `ads` from the raw snapshot, with their worth and popularity before `ds`."""
    days = [day for day in lake.days("behaviours") if 0 < (ds - day).days <= ECPM_DAYS]
    behaviours = read(spark, lake, "behaviours", days) if days else None
    ads = curate_ads(read(spark, lake, "raw_ads", [ds]), behaviours)
    publish(spark, settings, lake, "ads", ds, ads)


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Judge the events first, then publish the four curated tables."""
    ds, lake, limits = args.ds, Lake(settings.lake), settings.quality
    with session(settings, lake) as spark:
        users = read(spark, lake, "raw_users", [ds])
        ads = read(spark, lake, "raw_ads", [ds])
        # As far back as any example looks: there an event id must be unique.
        recent = ds - dt.timedelta(days=settings.interests.window_days)
        days = [day for day in lake.days("behaviours") if recent <= day < ds]
        curated = curate_events(
            read(spark, lake, "raw_ad_events", [ds]),
            read(spark, lake, "raw_content_events", [ds]),
            users,
            ads,
            read(spark, lake, "behaviours", days) if days else None,
            ds,
        )
        reasons = {
            r["reason"]: r["count"] for r in curated.quarantine.groupBy("reason").count().collect()
        }
        rate = sum(reasons.values()) / max(1, curated.events)
        repeated_rate = curated.repeated / max(1, curated.events)
        facts.record(
            settings,
            ds,
            "curate",
            events=curated.events,
            repeated=curated.repeated,
            quarantined=reasons,
        )
        print(f"{curated.events} events, {curated.repeated} repeated, quarantined: {reasons}")
        if rate > limits.max_unknown_reference_rate:
            raise QualityError(
                f"raw events of ds={ds}: {rate:.2%} name unknown users or ads or lie in the future"
                f" ({reasons}), more than quality.max_unknown_reference_rate ="
                f" {limits.max_unknown_reference_rate:.2%}; nothing was published"
            )
        if repeated_rate > limits.max_duplicate_event_rate:
            raise QualityError(
                f"raw events of ds={ds}: {repeated_rate:.2%} repeat an event id, more than"
                f" quality.max_duplicate_event_rate = {limits.max_duplicate_event_rate:.2%};"
                f" nothing was published"
            )
        publish(spark, settings, lake, "users", ds, users)
        publish_ads(spark, settings, lake, ds)
        publish(spark, settings, lake, "quarantine", ds, curated.quarantine)
        publish(spark, settings, lake, "behaviours", ds, curated.behaviours)


if __name__ == "__main__":
    main(run, parser(__doc__), "curate")
