"""Make the day's release the champion, unless it is worse than the champion by more than
`evaluation.tolerance` on the validation cases. Inference goes on with whoever is champion then.

With `--release` an operator names the champion as of the day, such as an earlier one to roll back
to; `infer` and `publish` of the day then bring its candidates.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json

from jobs.command import main, parser
from leadre_lib import facts
from leadre_lib.errors import LeadreError, NothingToDo
from leadre_lib.lake import Lake
from leadre_lib.release import Release, Releases
from leadre_lib.settings import Settings


def _require_words(settings: Settings, ds: dt.date, chosen: Release) -> None:
    """Refuse a release that would misread the day's Semantic IDs."""
    lake = Lake(settings.lake)
    if not lake.has("ad_semantic_ids", ds):
        return
    spoken = lake.read("ad_semantic_ids", ds, ["codebook"])["codebook"][0].as_py()
    if spoken != chosen.codebook:
        raise LeadreError(
            f"release {chosen.id} speaks codebook {chosen.codebook}, but `ad_semantic_ids` of"
            f" ds={ds} {spoken}: restore that partition to a version from before the refresh"
            f" (jobs.lake history ad_semantic_ids, jobs.lake restore ad_semantic_ids --ds {ds}"
            f" --version …), run interests of the day again, and then this"
        )


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Move the pointer for this day, or take back what an earlier run of the day had set."""
    ds, work, releases = args.ds, settings.work(args.ds), Releases(settings.releases)
    if args.release:
        chosen = releases.open(args.release)
        _require_words(settings, ds, chosen)
        with releases.lock():
            releases.promote(ds, chosen.id, "chosen by hand", rebuild=True)
        print(f"{chosen.id} is the champion as of {ds}; run infer and publish of that day")
        return
    path = work / "release.json"
    if not path.exists():
        with releases.lock():
            releases.withdraw(ds)
        raise NothingToDo(f"no release of ds={ds} was built")
    verdict = json.loads((work / "evaluation.json").read_text("utf-8"))
    release = releases.open(json.loads(path.read_text("utf-8"))["release"])
    with releases.lock():
        if verdict["promote"]:
            releases.promote(ds, release.id, verdict["reason"])
        else:
            releases.withdraw(ds)
        champion = releases.champion_entry()
    today = champion.release if champion else "none"
    what = "promoted" if verdict["promote"] else "not promoted"
    facts.record(
        settings,
        ds,
        "promote",
        release=release.id,
        promoted=verdict["promote"],
        reason=verdict["reason"],
    )
    print(f"{release.id} {what}: {verdict['reason']}; the champion of today is {today}")


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument(
        "--release", help="make this release the champion, whatever was measured"
    )
    main(run, arguments, "promote")
