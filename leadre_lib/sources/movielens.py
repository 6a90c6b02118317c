"""MovieLens-100K as a source: real people, films, tastes and times, read as an ad log.

The data come from inside the package `recbole`, which carries them as an example: its wheel is
fetched from the package index (never installed), checked, and read as a zip archive. Original data:
https://grouplens.org/datasets/movielens/100k/ (F. M. Harper, J. A. Konstan: The MovieLens Datasets,
ACM TiiS 5(4), 2015).

A film is an ad. Two partition days: the first holds every user's past, the second the end of it
that is held out. Knows nothing of how cases are evaluated.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock
from pyarrow import csv

from leadre_lib.contracts import load_contract
from leadre_lib.errors import LeadreError
from leadre_lib.settings import Settings
from leadre_lib.sources import RawDay, check_range

FOLDER = "recbole/dataset_example/ml-100k"
CONVERSION, CLICK = 4, 3  # least rating
ECPM_MEDIAN, ECPM_SIGMA = 20.0, 0.6
NOT_STATED = ["none", "other"]

# The first digit of a US ZIP code is an area of neighbouring states
# (https://en.wikipedia.org/wiki/ZIP_Code#Primary_state_prefixes)
ZIP_AREAS = (
    "New England and New Jersey",
    "New York, Pennsylvania and Delaware",
    "Mid-Atlantic and Carolinas",
    "Southeast",
    "Eastern Great Lakes",
    "Upper Midwest",
    "Central Midwest",
    "South Central",
    "Mountain West",
    "Pacific",
)


class MovieLens:
    """The ratings of MovieLens-100K as a source."""

    name = "movielens"
    has_ecpm = True

    def __init__(self, settings: Settings) -> None:
        """Fetch the data if they are not in the cache, and read them.

        Raises:
            LeadreError: the wheel can't be fetched, or it is not the one of the settings.
        """
        wheel = _fetch(
            settings.cache / "downloads",
            settings.movielens.recbole_version,
            settings.movielens.sha256,
        )
        with zipfile.ZipFile(wheel) as archive:
            self._users = _member(archive, "user")
            self._items = _member(archive, "item")
            ratings = _member(archive, "inter")
        self._seed = settings.seed
        self.made_from = {"seed": settings.seed, **settings.movielens.model_dump(mode="json")}
        self._ratings = _with_tail(ratings, settings.movielens.eval_last)
        latest = int(self._ratings["timestamp"].max())
        self._first = dt.datetime.fromtimestamp(latest, dt.UTC).date() + dt.timedelta(days=1)
        cases = len(np.unique(self._ratings["user"][self._ratings["tail"]]))
        self.notes = [
            "MovieLens-100K: a rating of 4 or 5 is a conversion, 3 a click, less a dismissal; a "
            "film is an ad that never stops.",
            f"{self._first} holds the past of all users, {self.last_ds()} what each of {cases} "
            f"users did from their conversion number {settings.movielens.eval_last} from the end "
            "on; events keep their own time.",
            "Many ratings share one second; ties are kept as they are.",
            "Made up: each film's eCPM is drawn once, log-normal with median "
            f"{ECPM_MEDIAN:.0f} and sigma {ECPM_SIGMA}; there is one advertiser, `unknown`. "
            "Residence is the area of the ZIP code's first digit.",
            "There are no content events, bids, GMV or propensities.",
        ]

    def first_ds(self) -> dt.date:
        """The day after the last rating."""
        return self._first

    def last_ds(self) -> dt.date:
        """The day of the held-out ends, one day later."""
        return self._first + dt.timedelta(days=1)

    def raw_day(self, ds: dt.date) -> RawDay:
        """The raw tables of one of the two days.

        Raises:
            LeadreError: `ds` is neither of them.
        """
        check_range(self, ds)
        return {
            "raw_users": self._raw_users(),
            "raw_ads": self._raw_ads(),
            "raw_ad_events": self._raw_ad_events(tail=ds == self.last_ds()),
            "raw_content_events": load_contract("raw_content_events").arrow_schema().empty_table(),
        }

    def _raw_users(self) -> pa.Table:
        users = self._users
        digit = pc.utf8_slice_codeunits(users["zip_code"], 0, 1)
        occupation = users["occupation"]
        stated = pc.invert(pc.is_in(occupation, pa.array(NOT_STATED)))
        return _table(
            "raw_users",
            {
                "user_id": _ids("u", users["user_id"], 4),
                "age": users["age"].cast(pa.int32()),
                "gender": _renamed(users["gender"], {"M": "male", "F": "female"}),
                "residence": _renamed(digit, {str(n): area for n, area in enumerate(ZIP_AREAS)}),
                "education": pa.nulls(len(users), pa.string()),
                "occupation": pc.if_else(stated, occupation, None),
            },
            "user_id",
        )

    def _raw_ads(self) -> pa.Table:
        items = self._items
        count = len(items)
        article = r"^(.*), (The|A|An)$"
        ids = _ids("m", items["item_id"], 4)
        genre = pc.list_element(pc.split_pattern(items["class"], " "), 0)
        genres = pc.replace_substring(items["class"], " ", ", ")
        began = dt.datetime.fromtimestamp(int(self._ratings["timestamp"].min()), dt.UTC).date()
        return _table(
            "raw_ads",
            {
                "ad_id": ids,
                "marketing_object_id": ids,
                "advertiser_id": pa.repeat("unknown", count),
                "title": pc.replace_substring_regex(items["movie_title"], article, r"\2 \1"),
                "description": pc.binary_join_element_wise(items["release_year"], genres, ", "),
                "category": pc.binary_join_element_wise("movie", pc.utf8_lower(genre), "/"),
                "bid": pa.nulls(count, pa.float64()),
                "start_date": pa.repeat(began, count),
                "stop_date": pa.nulls(count, pa.date32()),
            },
            "ad_id",
        )

    def _raw_ad_events(self, tail: bool) -> pa.Table:
        rows = self._ratings["tail"] == tail
        user, item = self._ratings["user"][rows], self._ratings["item"][rows]
        rating = self._ratings["rating"][rows]
        kind = np.where(rating >= CONVERSION, 0, np.where(rating >= CLICK, 1, 2))
        types = pa.array(["conversion", "click", "dismiss"])
        # indexed by the film's number, so that both days give a film the same eCPM
        largest = int(self._ratings["item"].max())
        draws = np.random.default_rng(self._seed % 2**63).normal(size=largest + 1)
        ecpm = np.round(ECPM_MEDIAN * np.exp(ECPM_SIGMA * draws[item]), 4)
        users, ads = _ids("u", pa.array(user), 4), _ids("m", pa.array(item), 4)
        return _table(
            "raw_ad_events",
            {
                "event_id": pc.binary_join_element_wise(users, ads, "-"),
                "user_id": users,
                "ad_id": ads,
                "event_type": types.take(pa.array(kind)),
                "event_time": pa.array(self._ratings["timestamp"][rows] * 1_000_000),
                "scene": pa.nulls(len(user), pa.string()),
                "ecpm": ecpm,
                "gmv": pa.nulls(len(user), pa.float64()),
                "propensity": pa.nulls(len(user), pa.float64()),
            },
            "event_id",
        )


def _with_tail(ratings: pa.Table, last: int) -> dict[str, np.ndarray]:
    """The ratings in (user, time, film) order, and which of them are held out.

    A user's tail begins with their `last`-th conversion from the end; who has fewer has no tail.

    Returns:
        user, item, rating, timestamp (seconds) and `tail` (bool), all [ratings].
    """
    user, item, stamp = (
        ratings[name].cast(pa.int64()).to_numpy() for name in ("user_id", "item_id", "timestamp")
    )
    rating = ratings["rating"].to_numpy()
    order = np.lexsort((item, stamp, user))
    user, item, rating, stamp = user[order], item[order], rating[order], stamp[order]
    # conversions of the same user from this row on, this row included
    converted = (rating >= CONVERSION).astype(np.int64)
    later = np.cumsum(converted[::-1])[::-1]
    after_user = np.append(later, 0)[np.searchsorted(user, user, side="right")]
    left = later - after_user
    is_start = (converted == 1) & (left == last)
    started = np.cumsum(is_start)
    before_user = np.concatenate([[0], started])[np.searchsorted(user, user, side="left")]
    tail = started > before_user
    return {"user": user, "item": item, "rating": rating, "timestamp": stamp, "tail": tail}


def _fetch(folder: Path, version: str, sha256: str) -> Path:
    """The wheel of recbole in the cache; fetched by pip if it is missing there or damaged.

    Raises:
        LeadreError: pip can't fetch it, or its checksum is not `sha256`.
    """
    wheel = folder / f"recbole-{version}-py3-none-any.whl"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "recbole.lock"):
        if not wheel.is_file() or _sha256(wheel) != sha256:
            with tempfile.TemporaryDirectory(dir=folder) as fresh:
                _download(version, Path(fresh))
                fetched = Path(fresh) / wheel.name
                found = _sha256(fetched) if fetched.is_file() else "no such file"
                if found != sha256:
                    raise LeadreError(
                        f"{wheel.name} from the package index has the SHA-256 {found}, expected "
                        f"{sha256}: set movielens.recbole_version and movielens.sha256 to a "
                        "version that you trust"
                    )
                os.replace(fetched, wheel)
    return wheel


def _download(version: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", f"recbole=={version}", "--no-deps"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--quiet", "--dest"]
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise LeadreError(
            f"can't fetch recbole {version} (it carries MovieLens-100K): {reason}. Check the "
            f"network and pip's index, or put its wheel into {folder.parent}"
        )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _member(archive: zipfile.ZipFile, kind: str) -> pa.Table:
    """One file of the data set; its heads are `name:type`, of which the name is kept."""
    content = archive.read(f"{FOLDER}/ml-100k.{kind}")
    text = {"item_id": pa.int64(), "rating": pa.float64(), "timestamp": pa.float64()}
    head = content.split(b"\n", 1)[0].decode().strip().split("\t")
    table = csv.read_csv(
        io.BytesIO(content),
        parse_options=csv.ParseOptions(delimiter="\t", quote_char=False),
        convert_options=csv.ConvertOptions(
            column_types={name: text.get(name.split(":")[0], pa.string()) for name in head}
        ),
    )
    return table.rename_columns([name.split(":")[0] for name in head])


def _ids(letter: str, numbers: pa.Array | pa.ChunkedArray, width: int) -> pa.Array:
    padded = pc.utf8_lpad(numbers.cast(pa.string()), width, "0")
    return pc.binary_join_element_wise(letter, padded, "")


def _renamed(values: pa.ChunkedArray, names: dict[str, str]) -> pa.Array:
    """Each value's name; null where it has none."""
    return pa.array(list(names.values())).take(pc.index_in(values, pa.array(list(names))))


def _table(name: str, columns: dict[str, object], key: str) -> pa.Table:
    """The columns as the contract wants them, sorted by key."""
    schema = load_contract(name).arrow_schema()
    table = pa.table([columns[n] for n in schema.names], schema.names).cast(schema)
    return table.sort_by(key).combine_chunks()
