"""Generate the candidates of one shard of the active users with the champion.

The champion is the one as of the day: what `promote` left. Parts that are finished are not redone.
Users whose prompt says what it said are carried over with `inference.incremental`. On a machine of
several accelerators the shards take turns on them.
"""

from __future__ import annotations

import argparse
import datetime as dt
from typing import TYPE_CHECKING

from jobs.command import main, parser
from leadre_lib.errors import LeadreError, NothingToDo
from leadre_lib.lake import Lake, Partition
from leadre_lib.release import Release, Releases
from leadre_lib.settings import Settings

if TYPE_CHECKING:
    from leadre_lib.candidates import Retriever


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Decode what is not finished of the shard."""
    ds, lake = args.ds, Lake(settings.lake)
    if not 0 <= args.shard < args.shards:
        raise LeadreError(f"--shard {args.shard}: must be from 0 to {args.shards - 1}")
    release = Releases(settings.releases).champion(before=ds + dt.timedelta(days=1))
    if release is None:
        raise NothingToDo("there is no champion yet: the first model is trained on the next day")
    # Ten seconds of imports that a day without a champion does without.
    from leadre_lib.inference import Shard, earlier_partition, infer_shard, parts_folder, parts_of

    earlier = earlier_partition(settings, lake, ds, release.id)
    folder = parts_folder(settings, lake, ds, release.id, earlier)
    size = settings.inference.users_per_part
    parts = Shard(args.shard, args.shards).of(parts_of(lake.use("user_prompts", ds), size))
    retriever = _retriever(settings, lake, ds, release, args.shard, earlier)
    if parts_folder(settings, lake, ds, release.id, earlier) != folder:
        raise LeadreError(f"the inputs of ds={ds} were published again meanwhile: run infer again")
    infer_shard(parts, retriever, folder, size)


def _retriever(
    settings: Settings,
    lake: Lake,
    ds: dt.date,
    release: Release,
    shard: int,
    earlier: Partition | None,
) -> Retriever:
    """The champion with the catalogue of the day, on the device of the shard."""
    import torch

    from leadre_lib import candidates
    from leadre_lib.catalogue import catalogue
    from leadre_lib.fusion import Factors, Fusion
    from leadre_lib.generation import open_decoder, sid_sizes
    from leadre_lib.indexes import open_constraint, open_neighbours, open_signals
    from leadre_lib.quantisers import Codebook
    from leadre_lib.retrieval import set_threads

    ads = catalogue(
        lake.read("ads", ds), lake.read("ad_semantic_ids", ds), ds + dt.timedelta(days=1)
    )
    release.require_codebook(ads.codebook, f"`ad_semantic_ids` of ds={ds}")
    for codebook in lake.values("user_prompts", ds, "codebook"):
        release.require_codebook(codebook, f"`user_prompts` of ds={ds}")
    for template in lake.values("user_prompts", ds, "template"):
        release.require_template(template, f"`user_prompts` of ds={ds}")
    decoding, inference = settings.decoding, settings.inference
    groups = candidates.groups_of(ads, decoding.group_by)
    near, rows = open_neighbours(release, ads)
    filler = fused = None
    if inference.fill:
        filler = candidates.Filler(ads, near, rows, groups, decoding.max_per_group)
    signals = open_signals(release, ads, near, rows)
    fusion = settings.with_fusion_of(release.manifest.get("fusion_settings")).fusion
    if fusion.enabled and signals is not None and release.manifest.get("fusion"):
        fused = (
            Fusion(signals, ads.active_objects, fusion, groups, decoding.max_per_group),
            Factors(**release.manifest["fusion"]),
        )
    torch.set_num_threads(inference.threads)
    set_threads(inference.threads)
    devices = torch.cuda.device_count()
    sizes = sid_sizes(Codebook.load(release.folder / "codebook").sizes, settings)
    return candidates.Retriever(
        decoder=open_decoder(
            release.model,
            open_constraint(release, ads, sizes),
            settings,
            groups,
            f"cuda:{shard % devices}" if devices else "cpu",
        ),
        catalogue=ads,
        release=release.id,
        ds=ds,
        k=decoding.top_k,
        exclude_seen=settings.evaluation.exclude_seen,
        fusion=fused,
        filler=filler,
        earlier=None
        if earlier is None
        else candidates.Earlier(earlier.files, ds, inference.max_age_days),
    )


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--shard", type=int, default=0, help="which shard, from 0 (default: 0)")
    arguments.add_argument("--shards", type=int, default=1, help="how many there are (default: 1)")
    main(run, arguments, "infer-{shard}")
