"""Make the day's release the champion, unless it is worse than the champion by more than
`evaluation.tolerance` on the validation cases. Inference goes on with whoever is champion then.

With `--release` an operator names the champion as of the day, such as an earlier one to roll back
to; `infer` and `publish` of the day then bring its candidates.
"""

from __future__ import annotations

import argparse
import json

from jobs.command import main, parser
from leadre_lib import facts
from leadre_lib.errors import NothingToDo
from leadre_lib.release import Releases
from leadre_lib.settings import Settings


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Move the pointer for this day, or take back what an earlier run of the day had set."""
    ds, work, releases = args.ds, settings.work(args.ds), Releases(settings.releases)
    if args.release:
        chosen = releases.open(args.release)
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
