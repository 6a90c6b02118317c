"""Give every ad a Semantic ID.

An ad that had an ID keeps it. New ads are embedded and encoded with the frozen codebook; the first
day, which has none, trains it. Writes `ad_semantic_ids`, which carries all ads known so far.
"""

from __future__ import annotations

import argparse

import pyarrow as pa
import pyarrow.compute as pc

from jobs.command import main, parser
from leadre_lib import facts
from leadre_lib.embeddings import ad_text, embed, encoder_id
from leadre_lib.errors import LeadreError
from leadre_lib.lake import Lake
from leadre_lib.quality import QualityError, publish
from leadre_lib.quantisers import Codebook, train_codebook
from leadre_lib.semantic_ids import assign, code_usage, format_sid
from leadre_lib.settings import Settings
from leadre_lib.spark import session


def _codebook(settings: Settings, previous: pa.Table | None, texts: list[str]) -> Codebook:
    """The codebook that the earlier IDs speak or, where there are none, a new one."""
    encoder = encoder_id(settings.embedding)
    if previous is not None:
        codebook = Codebook.load(settings.codebooks / previous["codebook"][0].as_py())
        if codebook.config["text_encoder"] != encoder:
            raise LeadreError(
                f"codebook {codebook.version} was trained on {codebook.config['text_encoder']}, but"
                f" embedding.model is now {encoder}: set it back, or start in a new LEADRE_HOME"
            )
        return codebook
    vectors = embed(texts, settings.embedding, settings.cache)
    trained = train_codebook(vectors, settings.semantic_ids, settings.seed, encoder)
    trained.save(settings.codebooks / trained.version)
    return trained


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Assign, check the collision rate, publish."""
    ds, lake = args.ds, Lake(settings.lake)
    columns = ["ad_id", "title", "description", "text_hash"]
    ads = lake.read("ads", ds, columns).sort_by("ad_id")
    days = [day for day in lake.days("ad_semantic_ids") if day < ds or (args.keep and day == ds)]
    previous = lake.read("ad_semantic_ids", days[-1]) if days else None
    texts = [
        ad_text(t, d)
        for t, d in zip(ads["title"].to_pylist(), ads["description"].to_pylist(), strict=True)
    ]
    codebook = _codebook(settings, previous, texts)
    # Ads that have an ID keep it, so only the others need a vector.
    known = (
        previous["ad_id"].combine_chunks() if previous is not None else pa.array([], pa.string())
    )
    is_new = pc.invert(pc.is_in(ads["ad_id"], known)).to_numpy(zero_copy_only=False)
    new_ads = ads.filter(pa.array(is_new))
    new_texts = [text for text, new in zip(texts, is_new, strict=True) if new]
    vectors = embed(new_texts, settings.embedding, settings.cache)
    full = assign(
        new_ads["ad_id"].to_pylist(),
        codebook.encode(vectors),
        previous,
        settings.semantic_ids.collision_codes,
        codebook.alternatives(vectors, settings.semantic_ids.alternatives),
    )
    made = pa.table(
        {
            "ad_id": new_ads["ad_id"],
            "semantic_id": pa.array(format_sid(full), pa.string()),
            "codes": pa.array(list(full), pa.list_(pa.int32())),
            "text_hash": new_ads["text_hash"],
            "codebook": pa.array([codebook.version] * len(full), pa.string()),
        }
    )
    rows = made if previous is None else pa.concat_tables([previous.cast(made.schema), made])
    rows = rows.sort_by("ad_id")
    values = rows["codes"].combine_chunks().flatten().to_numpy().reshape(rows.num_rows, -1)
    usage = code_usage(values, codebook.sizes)
    facts.record(
        settings, ds, "semantic_ids", codebook=codebook.version, new_ads=len(full), **usage
    )
    limit = settings.quality.max_collision_rate
    print(
        f"{rows.num_rows} ads, {len(full)} new, codebook {codebook.version}, collisions before the"
        f" last token {usage['collision_rate']:.2%}"
    )
    if usage["collision_rate"] > limit:
        raise QualityError(
            f"Semantic IDs of ds={ds}: {usage['collision_rate']:.2%} of the ads collide before the"
            f" last token, more than quality.max_collision_rate = {limit:.2%}: train a codebook"
            f" with more codes (semantic_ids.codes); nothing was published"
        )
    with session(settings) as spark:
        publish(spark, settings, lake, "ad_semantic_ids", ds, rows)


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument(
        "--keep", action="store_true", help="keep also the IDs that an earlier run of the day gave"
    )
    main(run, arguments, "semantic_ids")
