"""Direct Preference Optimization of the day's SFT model, by ranks under DeepSpeed.

Reads the day's preference pairs and `sft/model`, writes `dpo/model` and `dpo/loss.json` in the
day's work folder. With the origin `beam` it first decodes prompts of `sft_examples` with the SFT
model, and writes the pairs among what that lists to `beam_pairs.parquet`. Resumes from the newest
whole checkpoint of an earlier attempt; done already, it only says so. A source without eCPM has no
pairs, and the SFT model stands.
"""

from __future__ import annotations

import argparse
import datetime as dt

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.command import main, parser
from leadre_lib import facts
from leadre_lib.errors import NothingToDo
from leadre_lib.facts import remove
from leadre_lib.lake import Lake
from leadre_lib.settings import Settings

BEAM_PAIRS = "beam_pairs.parquet"
PAIR_COLUMNS = ["origin", "prompt", "chosen", "rejected", "chosen_ecpm", "rejected_ecpm"]


def _pairs(settings: Settings, ds: dt.date) -> pa.Table:
    """The pairs of all origins that the settings name, in an order of their own."""
    lake, origins = Lake(settings.lake), settings.dpo.origins
    pairs = lake.read("preference_pairs", ds).sort_by("pair_id").select(PAIR_COLUMNS)
    pairs = pairs.filter(pc.is_in(pairs["origin"], pa.array(origins, pa.string())))
    if "beam" in origins:
        pairs = pa.concat_tables([pairs, _beam_pairs(settings, lake, ds)])
    return pairs


def _beam_pairs(settings: Settings, lake: Lake, ds: dt.date) -> pa.Table:
    """Pairs of the origin `beam`; none where no ad has an eCPM."""
    table = lake.read("ads", ds)
    if table["ecpm"].null_count == table.num_rows:
        return lake.read("preference_pairs", ds).select(PAIR_COLUMNS).slice(0, 0)
    from leadre_lib.beam_pairs import beam_pairs
    from leadre_lib.catalogue import catalogue
    from leadre_lib.constraint_index import ConstraintIndex
    from leadre_lib.generation import open_decoder, sid_sizes
    from leadre_lib.quantisers import Codebook

    ads = catalogue(table, lake.read("ad_semantic_ids", ds), ds)
    sizes = sid_sizes(Codebook.load(settings.codebooks / ads.codebook).sizes, settings)
    index = ConstraintIndex.build(ads.codes, sizes, ads.active_objects, codebook=ads.codebook)
    # As `evaluate` does it: vLLM would stay in memory.
    decoding = settings.decoding.model_copy(update={"backend": "leadre"})
    own = settings.model_copy(update={"decoding": decoding})
    decoder = open_decoder(settings.work(ds) / "sft" / "model", index, own)
    made = beam_pairs(decoder, lake.read("sft_examples", ds), ads, settings)
    pq.write_table(made, settings.work(ds) / BEAM_PAIRS)
    return made


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Prepare what the ranks read, then run them."""
    ds = args.ds
    remove(settings.work(ds) / BEAM_PAIRS)
    pairs = _pairs(settings, ds)
    if not pairs.num_rows:
        remove(settings.work(ds) / "dpo")
        raise NothingToDo(
            f"no preference pairs on {ds} (dpo.origins: {', '.join(settings.dpo.origins)}): they"
            " need two ads with an eCPM near to one user; the SFT model stands"
        )
    # Ten seconds of imports that a source without eCPM does without.
    from leadre_lib.preferences import preference_lists
    from leadre_lib.training import prepare_dpo, run_ranks

    lists = preference_lists(pairs, settings.dpo)
    prepare_dpo(lists, settings.work(ds), settings)
    run_ranks("dpo", settings.work(ds), settings)
    of_origin = {
        row["values"]: row["counts"] for row in pc.value_counts(pairs["origin"]).to_pylist()
    }
    facts.record(settings, ds, "dpo", pairs=of_origin, lists=lists.num_rows)


if __name__ == "__main__":
    main(run, parser(__doc__), "dpo")
