"""Releases: immutable folders of what belongs together, and the pointer that names the champion.

A release holds the codebook, the Semantic IDs, the model with its tokenizer, the indexes, and a
`manifest.json` with the versions, the checksum of every file, the metrics and the parents. Its id
is its day and a hash of its content, so that the same content is the same release.

    <root>/<id>/manifest.json, codebook/, semantic_ids/, model/, indexes/
    <root>/champion.json      history of champions, one entry a day and rebuild; replaced atomically

A job for `ds` reads the champion as it was before `ds`; the entry of the newest day is the champion
of today. So a backfilled day gets its own entry and never replaces today's champion.

Knows nothing of what the files hold.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import json
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from leadre_lib.errors import LeadreError
from leadre_lib.facts import write_json

FORMAT = 1
MANIFEST = "manifest.json"
LOCK_SECONDS = 600
SUFFIXES = {".safetensors", ".npy", ".parquet", ".json", ".jinja", ".txt", ".faiss", ".model"}


class ReleaseError(LeadreError):
    """A release is missing, damaged or a mix of what does not belong together."""


@dataclass(frozen=True)
class Release:
    """One release that has been checked."""

    id: str
    folder: Path
    manifest: dict[str, Any]

    @property
    def codebook(self) -> str:
        """Version of the codebook that model, Semantic IDs and indexes speak."""
        return str(self.manifest["versions"]["codebook"])

    @property
    def model(self) -> Path:
        """Folder of the model and its tokenizer."""
        return self.folder / "model"

    @property
    def template(self) -> str:
        """Version of the template of the prompts that the model was trained on."""
        return str(self.manifest["versions"].get("template", "unknown"))

    def require_codebook(self, version: str, what: str) -> None:
        """Raise `ReleaseError` unless `what` was made with this release's codebook."""
        if version != self.codebook:
            raise ReleaseError(
                f"{what} was made with codebook {version}, but release {self.id} speaks"
                f" {self.codebook}: rebuild one of them; Semantic IDs would be misread in silence"
            )

    def require_template(self, version: str, what: str) -> None:
        """Raise `ReleaseError` unless `what` asks in the words that this release's model knows."""
        if version != self.template:
            raise ReleaseError(
                f"{what} was written with template {version}, but the model of release {self.id}"
                f" was trained with {self.template}: set prompt.language back and run interests of"
                f" the day again, or train and promote a model with {version} first"
            )


@dataclass(frozen=True)
class Champion:
    """One entry of the champion's history. `sequence` counts the rebuilds after the day's run."""

    ds: str
    sequence: int
    release: str
    reason: str


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _listing(folder: Path) -> dict[str, dict[str, Any]]:
    """Checksum and size of every file below `folder`, by relative path."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    for path in files:
        if path.suffix not in SUFFIXES:
            raise ReleaseError(
                f"{path}: a release holds safetensors, arrays, parquet and JSON, not this"
            )
    return {
        path.relative_to(folder).as_posix(): {
            "sha256": _sha256(path),
            "bytes": path.stat().st_size,
        }
        for path in files
    }


@dataclass(frozen=True)
class Releases:
    """All releases below one folder, and their champion."""

    root: Path

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the champion: training and index rebuilds take turns at it.

        Raises:
            ReleaseError: somebody else held it for all of ten minutes.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.root / "champion.lock", timeout=LOCK_SECONDS)
        try:
            lock.acquire()
        except Timeout:
            raise ReleaseError(
                f"{lock.lock_file}: another job holds the champion; wait for it and run again"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def build(self, ds: dt.date, parts: Mapping[str, Path], manifest: Mapping[str, Any]) -> Release:
        """Copy `parts` (name in the release → file or folder) into a new release.

        Content that is a release already gives that release. A crash leaves nothing that is read.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=".staged-", dir=self.root))
        try:
            for name, source in parts.items():
                target = staged / name
                target.parent.mkdir(parents=True, exist_ok=True)
                if source.is_dir():
                    shutil.copytree(source, target)
                else:
                    shutil.copy2(source, target)
            files = _listing(staged)
            # Not the version of the code: the same content is the same release.
            versions = manifest.get("versions", {})
            words = [versions.get("codebook"), versions.get("template"), manifest.get("fusion")]
            content = json.dumps([files, *words], sort_keys=True)
            release_id = f"{ds}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
            whole = {"format": FORMAT, "id": release_id, "ds": str(ds), "files": files, **manifest}
            write_json(staged / MANIFEST, whole)
            staged.chmod(0o755)
            if not (self.root / release_id).exists():
                staged.rename(self.root / release_id)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        return self.open(release_id)

    def open(self, release_id: str) -> Release:
        """Read a release and check every file against the manifest.

        Raises:
            ReleaseError: it is missing, or a file is missing, truncated, swapped or too many; the
                message names the file.
        """
        folder = self.root / release_id
        try:
            manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        except FileNotFoundError:
            raise ReleaseError(f"{folder}: no such release") from None
        except ValueError as error:
            raise ReleaseError(f"{folder / MANIFEST}: not readable: {error}") from None
        if manifest.get("format") != FORMAT:
            raise ReleaseError(
                f"{folder}: format {manifest.get('format')}, this code reads {FORMAT}"
            )
        found, listed = _listing(folder), manifest["files"]
        for name in sorted(found.keys() | listed.keys()):
            if name not in found:
                raise ReleaseError(f"{folder / name}: listed in the manifest, but missing")
            if name not in listed:
                raise ReleaseError(f"{folder / name}: not listed in the manifest")
            if found[name] != listed[name]:
                raise ReleaseError(
                    f"{folder / name}: differs from the manifest's checksum: restore it or choose"
                    f" another release"
                )
        return Release(release_id, folder, manifest)

    def history(self) -> list[Champion]:
        """All champions, oldest day first."""
        path = self.root / "champion.json"
        if not path.exists():
            return []
        try:
            return [Champion(**entry) for entry in json.loads(path.read_text("utf-8"))]
        except (ValueError, TypeError) as error:
            raise ReleaseError(f"{path}: not readable: {error}") from None

    def champion(self, before: dt.date | None = None) -> Release | None:
        """The champion of today or, with `before`, as it was before that day; None: there is none.

        Raises:
            ReleaseError: the release that the pointer names is missing or damaged.
        """
        entry = self.champion_entry(before)
        return None if entry is None else self.open(entry.release)

    def champion_entry(self, before: dt.date | None = None) -> Champion | None:
        """The history's entry behind `champion`, without opening the release."""
        entries = [e for e in self.history() if before is None or e.ds < before.isoformat()]
        return entries[-1] if entries else None

    def promote(self, ds: dt.date, release_id: str, reason: str, rebuild: bool = False) -> None:
        """Make a release the champion of `ds`. Hold `lock` around reading and promoting.

        The daily run of a day replaces all of the day's entries; a rebuild adds one after them.
        """
        day = ds.isoformat()
        same_day = [e for e in self.history() if e.ds == day]
        kept = [e for e in self.history() if e.ds != day] + (same_day if rebuild else [])
        sequence = max((e.sequence for e in same_day), default=-1) + 1 if rebuild else 0
        self._write([*kept, Champion(day, sequence, release_id, reason)])

    def withdraw(self, ds: dt.date) -> None:
        """Take the entries of a day back: its challenger was not promoted after all."""
        self._write([e for e in self.history() if e.ds != ds.isoformat()])

    def keep_codebook(self, ds: dt.date, codebook: str) -> None:
        """Take the entries of a day back whose releases speak another codebook. Hold `lock`."""
        day = ds.isoformat()
        kept = [e for e in self.history() if e.ds != day or self.codebook_of(e) == codebook]
        if len(kept) < len(self.history()):
            self._write(kept)

    def codebook_of(self, entry: Champion) -> str:
        """The codebook that an entry's release speaks; the release's files are not checked."""
        path = self.root / entry.release / MANIFEST
        try:
            return str(json.loads(path.read_text("utf-8"))["versions"]["codebook"])
        except (OSError, ValueError, KeyError) as error:
            raise ReleaseError(f"{path}: not readable: {error}") from None

    def _write(self, entries: list[Champion]) -> None:
        ordered = sorted(entries, key=lambda e: (e.ds, e.sequence))
        write_json(self.root / "champion.json", [asdict(entry) for entry in ordered])


def environment_versions() -> dict[str, str]:
    """Versions of what shapes a model, for the manifest."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "trl", "deepspeed")} | {
        "python": platform.python_version()
    }
