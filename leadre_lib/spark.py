"""Spark sessions on either engine, and reading and writing lake tables with them.

`sail` is a Spark Connect server in this process (Rust, no Java); `spark` is Apache Spark. Both are
set so that equal inputs give equal rows: session time zone UTC, timestamps stored in microseconds,
partition types never inferred.

Knows nothing of what the tables mean.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import reduce

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from leadre_lib.contracts import PARTITION, Contract, load_contract
from leadre_lib.errors import LeadreError
from leadre_lib.lake import Attempt, Lake, LakeError, Partition
from leadre_lib.settings import REPOSITORY, Settings

JAVA_VERSIONS = (17, 21)
# What a Spark Connect session, such as Sail's, leaves in the environment of its process and of what
# that process starts; with it, PySpark refuses to start Apache Spark.
CONNECT_VARIABLES = (
    "SPARK_REMOTE",
    "SPARK_LOCAL_REMOTE",
    "SPARK_CONNECT_MODE_ENABLED",
    "SPARK_API_MODE",
)
CONF = {
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
    "spark.sql.sources.partitionColumnTypeInference.enabled": "false",
    "spark.sql.execution.arrow.pyspark.enabled": "true",
}


def check_java() -> None:
    """Raise `LeadreError` unless the `java` that Apache Spark would start is version 17 or 21."""
    home = os.environ.get("JAVA_HOME")
    java = os.path.join(home, "bin", "java") if home else shutil.which("java")
    mend = "install it (Debian: apt-get install openjdk-17-jre-headless) or use ENGINE=sail"
    if not java or not os.path.exists(java):
        raise LeadreError(f"ENGINE=spark needs Java 17 or 21 and none was found: {mend}")
    result = subprocess.run([java, "-version"], capture_output=True, text=True, check=False)
    match = re.search(r'version "(\d+)', result.stderr)
    if not match or int(match[1]) not in JAVA_VERSIONS:
        found = match[1] if match else "an unreadable version"
        raise LeadreError(f"ENGINE=spark needs Java 17 or 21, and {java} is {found}: {mend}")


@contextlib.contextmanager
def session(settings: Settings, lake: Lake | None = None) -> Iterator[SparkSession]:
    """A Spark session on the engine of the settings, stopped at the end.

    Engines do not say which file is damaged. So where one fails, what was read from `lake` is
    looked at.

    Raises:
        LakeError: the work inside failed, and a file of `lake` is damaged.
    """
    with _engine(settings) as spark:
        try:
            yield spark
        except LeadreError:
            raise
        except Exception:
            if lake is not None:
                lake.check_reads()
            raise


@contextlib.contextmanager
def _engine(settings: Settings) -> Iterator[SparkSession]:
    spark = _spark(settings) if settings.engine == "spark" else None
    if spark is not None:
        yield spark
        spark.stop()
        return
    os.environ.setdefault("RUST_LOG", "error")  # read when the server's library is loaded
    from pysail.spark import SparkConnectServer

    server = SparkConnectServer("127.0.0.1", 0)
    server.start(background=True)
    _, port = server.listening_address
    spark = SparkSession.builder.remote(f"sc://127.0.0.1:{port}").getOrCreate()
    for key, value in CONF.items():
        spark.conf.set(key, value)
    try:
        yield spark
    finally:
        with contextlib.suppress(Exception):  # the server goes with the process in any case
            spark.stop()
        server.stop()


def _spark(settings: Settings) -> SparkSession:
    check_java()
    for name in CONNECT_VARIABLES:
        os.environ.pop(name, None)
    # Workers must run this very Python, with this library on their path.
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    builder = SparkSession.builder.appName("leadre")
    if "SPARK_ENV_LOADED" not in os.environ:  # spark-submit has chosen a master already
        builder = builder.master(settings.spark.master).config(
            "spark.driver.memory", settings.spark.driver_memory
        )
    conf = {
        **CONF,
        "spark.sql.shuffle.partitions": str(settings.spark.shuffle_partitions),
        "spark.ui.enabled": "false",
        "spark.sql.ansi.enabled": "true",
    }
    for key, value in conf.items():
        builder = builder.config(key, value)
    spark = builder.getOrCreate()
    spark.sparkContext.setLogLevel("ERROR")
    return spark


def read_files(
    spark: SparkSession, partition: Partition | Attempt, contract: Contract
) -> DataFrame:
    """The rows of the listed files with the contract's schema, `ds` left out."""
    paths = [str(path) for path in partition.files]
    return spark.read.schema(contract.spark_schema()).parquet(*paths)


def read(
    spark: SparkSession, lake: Lake, table: str, days: Sequence[dt.date], partition: bool = False
) -> DataFrame:
    """The rows of the given published days of a table; with `partition`, `ds` as the last column.

    Each day's files are read by themselves and `ds` is added as a literal: listing files of many
    days with `ds` in the schema gives nulls on both engines, in silence.

    Raises:
        LakeError: a day is not published, or one of its files is damaged.
    """
    contract = load_contract(table)
    frames = []
    for day in days:
        frame = read_files(spark, lake.use(table, day), contract)
        frames.append(frame.withColumn(PARTITION, F.lit(day)) if partition else frame)
    if not frames:
        raise LakeError(f"table {table}: no days were asked for")
    return reduce(DataFrame.unionAll, frames)


def write(frame: DataFrame, attempt: Attempt) -> None:
    """Write a frame as the data files of an attempt.

    Raises:
        LakeError: its columns or types are not the contract's.
    """
    contract = attempt.contract
    wanted = contract.spark_schema()
    if sorted(frame.columns) != sorted(wanted.names):
        raise LakeError(
            f"table {contract.table}: columns {frame.columns} are not the contract's {wanted.names}"
        )
    frame = frame.select(*wanted.names)
    for have, want in zip(frame.schema.fields, wanted.fields, strict=True):
        if have.dataType.simpleString() != want.dataType.simpleString():
            raise LakeError(
                f"table {contract.table}: column {want.name!r} is {have.dataType.simpleString()},"
                f" but the contract says {want.dataType.simpleString()}"
            )
    frame.write.parquet(str(attempt.folder))
    attempt.folder.mkdir(parents=True, exist_ok=True)  # Sail makes none for an empty frame
    for path in attempt.folder.iterdir():
        if path.suffix != ".parquet":
            path.unlink()  # _SUCCESS and checksums: the log says what is published
