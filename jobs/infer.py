"""Generate the candidates of one shard of the active users with the champion.

The champion is the one as of the day: what `promote` left. Parts that are finished are not redone.
"""

from __future__ import annotations

import argparse
import datetime as dt

from jobs.command import main, parser
from leadre_lib.errors import LeadreError, NothingToDo
from leadre_lib.lake import Lake
from leadre_lib.release import Releases
from leadre_lib.settings import Settings


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Decode what is not finished of the shard."""
    ds, lake = args.ds, Lake(settings.lake)
    if not 0 <= args.shard < args.shards:
        raise LeadreError(f"--shard {args.shard}: must be from 0 to {args.shards - 1}")
    release = Releases(settings.releases).champion(before=ds + dt.timedelta(days=1))
    if release is None:
        raise NothingToDo("there is no champion yet: the first model is trained on the next day")
    # Ten seconds of imports that a day without a champion does without.
    import torch

    from leadre_lib.catalogue import catalogue
    from leadre_lib.generation import open_decoder, sid_sizes
    from leadre_lib.indexes import open_constraint
    from leadre_lib.inference import Shard, infer_shard, parts_folder
    from leadre_lib.quantisers import Codebook

    prompts = lake.read("user_prompts", ds).sort_by("user_id")
    ads = catalogue(
        lake.read("ads", ds), lake.read("ad_semantic_ids", ds), ds + dt.timedelta(days=1)
    )
    release.require_codebook(ads.codebook, f"`ad_semantic_ids` of ds={ds}")
    if prompts.num_rows:
        release.require_codebook(prompts["codebook"][0].as_py(), f"`user_prompts` of ds={ds}")
    sizes = sid_sizes(Codebook.load(release.folder / "codebook").sizes, settings)
    folder = parts_folder(settings, lake, ds, release.id)
    torch.set_num_threads(settings.inference.threads)
    decoder = open_decoder(release.model, open_constraint(release, ads, sizes), settings)
    shard = Shard(args.shard, args.shards)
    infer_shard(prompts, shard, decoder, ads, release.id, folder, settings)


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--shard", type=int, default=0, help="which shard, from 0 (default: 0)")
    arguments.add_argument("--shards", type=int, default=1, help="how many there are (default: 1)")
    main(run, arguments, "infer-{shard}")
