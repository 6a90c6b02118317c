"""Generate the candidates of one shard of the active users with the champion.

The champion is the one as of the day: what `promote` left. Parts that are finished are not redone.
Users whose prompt says what it said are carried over with `inference.incremental`. On a machine of
several accelerators the shards take turns on them.
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

    from leadre_lib.candidates import Filler, Retriever, groups_of
    from leadre_lib.catalogue import catalogue
    from leadre_lib.generation import open_decoder, sid_sizes
    from leadre_lib.indexes import open_constraint, open_neighbours
    from leadre_lib.inference import (
        Shard,
        earlier_partition,
        infer_shard,
        open_earlier,
        parts_folder,
        parts_of,
    )
    from leadre_lib.quantisers import Codebook

    prompts = lake.use("user_prompts", ds)
    ads = catalogue(
        lake.read("ads", ds), lake.read("ad_semantic_ids", ds), ds + dt.timedelta(days=1)
    )
    release.require_codebook(ads.codebook, f"`ad_semantic_ids` of ds={ds}")
    for codebook in lake.values("user_prompts", ds, "codebook"):
        release.require_codebook(codebook, f"`user_prompts` of ds={ds}")
    earlier = earlier_partition(settings, lake, ds, release.id)
    size = settings.inference.users_per_part
    parts = Shard(args.shard, args.shards).of(parts_of(prompts, size))
    codebook_sizes = Codebook.load(release.folder / "codebook").sizes
    index = open_constraint(release, ads, sid_sizes(codebook_sizes, settings))
    torch.set_num_threads(settings.inference.threads)
    devices = torch.cuda.device_count()
    retriever = Retriever(
        open_decoder(
            release.model,
            index,
            settings,
            groups_of(ads, settings.decoding.group_by),
            f"cuda:{args.shard % devices}" if devices else "cpu",
        ),
        ads,
        release.id,
        ds,
        settings.decoding.top_k,
        settings.evaluation.exclude_seen,
        Filler(ads, *open_neighbours(release, ads)) if settings.inference.fill else None,
        open_earlier(settings, ds, earlier),
    )
    folder = parts_folder(settings, lake, ds, release.id, earlier)
    infer_shard(parts, retriever, folder, size)


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--shard", type=int, default=0, help="which shard, from 0 (default: 0)")
    arguments.add_argument("--shards", type=int, default=1, help="how many there are (default: 1)")
    main(run, arguments, "infer-{shard}")
