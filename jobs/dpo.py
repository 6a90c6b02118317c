"""Direct Preference Optimization of the day's SFT model by eCPM, by ranks under DeepSpeed.

Reads the day's preference pairs and `sft/model`, writes `dpo/model` and `dpo/loss.json` in the
day's work folder. Resumes from the newest whole checkpoint of an earlier attempt; done already, it
only says so. A source without eCPM has no pairs, and the SFT model stands.
"""

from __future__ import annotations

import argparse

from jobs.command import main, parser
from leadre_lib import facts
from leadre_lib.errors import NothingToDo
from leadre_lib.facts import remove
from leadre_lib.lake import Lake
from leadre_lib.settings import Settings


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Prepare what the ranks read, then run them."""
    ds = args.ds
    pairs = Lake(settings.lake).read("preference_pairs", ds).sort_by("pair_id")
    if not pairs.num_rows:
        remove(settings.work(ds) / "dpo")
        raise NothingToDo(
            f"no preference pairs on {ds}: they need ads of different eCPM that one user clicked or"
            f" converted on within a day; the SFT model stands"
        )
    # Ten seconds of imports that a source without eCPM does without.
    from leadre_lib.training import prepare_dpo, run_ranks

    prepare_dpo(pairs, settings.work(ds), settings)
    run_ranks("dpo", settings.work(ds), settings)
    facts.record(settings, ds, "dpo", pairs=pairs.num_rows)


if __name__ == "__main__":
    main(run, parser(__doc__), "dpo")
