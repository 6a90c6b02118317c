"""The online store: the published candidates where a service looks them up by user.

SQLite by default; one transaction replaces everything, so a reader sees one day or the next.

Knows nothing of how candidates are made.
"""

from __future__ import annotations

import datetime as dt
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from leadre_lib.errors import LeadreError

COLUMNS = ("user_id", "rank", "ad_id", "semantic_id", "score", "source", "release")
BATCH_ROWS = 65536


@dataclass(frozen=True)
class OnlineStore:
    """Candidates in a SQLite file."""

    path: Path

    def replace(self, candidates: pa.Table, ds: dt.date) -> None:
        """Serve `candidates` (the contract's columns) of day `ds` from now on."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(self.path, timeout=60)) as db, db:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("CREATE TABLE IF NOT EXISTS served (ds TEXT)")
            db.execute("BEGIN IMMEDIATE")
            db.execute("DROP TABLE IF EXISTS candidates")
            db.execute(
                "CREATE TABLE candidates (user_id TEXT, rank INTEGER, ad_id TEXT, semantic_id TEXT,"
                " score REAL, source TEXT, release TEXT, PRIMARY KEY (user_id, rank)) WITHOUT ROWID"
            )
            db.execute("DELETE FROM served")
            for batch in candidates.select(list(COLUMNS)).to_batches(BATCH_ROWS):
                columns = [column.to_pylist() for column in batch.columns]
                db.executemany(
                    "INSERT INTO candidates VALUES (?, ?, ?, ?, ?, ?, ?)",
                    zip(*columns, strict=True),
                )
            db.execute("INSERT INTO served VALUES (?)", (ds.isoformat(),))

    def served(self) -> dt.date | None:
        """The day whose candidates are served; None before the first publish."""
        if not self.path.exists():
            return None
        with closing(sqlite3.connect(self.path)) as db:
            # A first publish that was killed leaves a file without tables.
            tables = db.execute("SELECT name FROM sqlite_master WHERE name = 'served'").fetchall()
            row = db.execute("SELECT ds FROM served").fetchone() if tables else None
        return dt.date.fromisoformat(row[0]) if row else None

    def candidates(self, user_id: str) -> list[dict[str, Any]]:
        """The candidates of one user, best first; empty for a user without any.

        Raises:
            LeadreError: nothing was published yet.
        """
        if self.served() is None:
            raise LeadreError(f"{self.path}: no online store yet: run the daily chain first")
        with closing(sqlite3.connect(self.path)) as db:
            db.row_factory = sqlite3.Row
            try:
                rows = db.execute(
                    "SELECT user_id, rank, ad_id, semantic_id, score, source, release"
                    " FROM candidates WHERE user_id = ? ORDER BY rank",
                    (user_id,),
                ).fetchall()
            except sqlite3.OperationalError as error:
                if "no such" not in str(error):
                    raise
                raise LeadreError(
                    f"{self.path}: not as this version writes it ({error}): publish the day again"
                ) from None
        return [dict(row) for row in rows]
