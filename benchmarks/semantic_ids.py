"""A report card of the quantisers that make Semantic IDs, side by side on the same embeddings.

Every method is trained as `jobs.semantic_ids` trains it, in a process of its own, on two data sets:
`amazon`, a folder of Amazon reviews (see `leadre_lib.sources.amazon`), and `simulator`, a world of
100,000 ads. What the rows say, fractions as fractions:

- `collision`: objects that share their codes before the last token, as the IDs are given; `raw
  collision`: as the codebook has it. 1 - distinct codes / objects. After the last token there is
  none, or the run fails.
- `used`, `entropy`: codes of each level in use, and their bits.
- `error`: of the reconstruction; 1 is no better than the mean of all embeddings.
- `category 1`, `category 2`: pairs of objects of one first code, or first two codes, that share
  their category; `lift`: against random pairs.
- `co-conversion lift`: how often two objects that a user converted on in turn share their first
  code, against two objects drawn by how often they were converted on.
- `kept frozen`, `kept refreshed`: after 5 % of the objects were replaced, the others that keep
  their IDs with the codebook as it was, and those whose nearest codes are still the same in a
  refreshed one (a refresh holds them to their codes, near or not). Of a large catalogue 10,000
  objects are drawn.
- `train s`, `encode s`, `peak MB`: of the codebook, on one core; the memory is that of the whole
  process, `at rest MB` what it needs for the embeddings and libraries alone.
- `HR@10`: of a small model that writes the IDs, see `next_object`.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import faiss
import jinja2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from benchmarks.next_object import Cases, hit_rate
from benchmarks.page import as_svg, new_figure
from leadre_lib.catalogue import marketing_objects
from leadre_lib.embeddings import ad_text, embed
from leadre_lib.errors import LeadreError
from leadre_lib.evaluation import Histories, Rows
from leadre_lib.quantisers import Codebook, Codes, Vectors, refit_codebook, train_codebook
from leadre_lib.semantic_ids import assign, code_usage
from leadre_lib.settings import ENV_PREFIX, METHODS, SemanticIdSettings, Settings, load_settings
from leadre_lib.sources import open_source

SOURCES = ("amazon", "simulator")
WORLD = {"ads": 100_000, "users": 20_000}
CHURN = 0.05
CHURN_OBJECTS = 10_000  # each method trains on them twice more
MOST_CASES = 5000  # evaluated; of the simulator SIMULATED_CASES
SIMULATED_CASES = 2000
EVERY = slice(None)
TEMPLATE = Path(__file__).with_suffix(".html.jinja")
DIGITS = {  # after the point; of all else 4
    "entropy": 2,
    "category 1 lift": 2,
    "category 2 lift": 2,
    "co-conversion lift": 2,
    "train s": 1,
    "encode s": 1,
    "at rest MB": 0,
    "peak MB": 0,
    "assign s": 1,
    "vectors MB": 0,
}
PLOTTED = (
    "collision",
    "raw collision",
    "level-1 used",
    "error",
    "category 1",
    "co-conversion lift",
    "kept refreshed",
    "HR@10",
)


@dataclass(frozen=True)
class Data:
    """Objects, one a row, and what users did with them.

    Attributes:
        categories: a number for each object's category; None where objects have none.
        taken: what each user of the first day clicked or converted on.
        converted: what each of them converted on.
        cases: conversions of the second day.
    """

    settings: Settings
    ids: npt.NDArray[np.str_]
    vectors: Vectors
    categories: Rows | None
    taken: Histories
    converted: Histories
    cases: Cases

    @property
    def words(self) -> str:
        """What the data are, in a sentence."""
        return (
            f"{len(self.ids)} objects; {len(self.taken)} users took {len(self.taken.values)} of"
            f" them and converted on {len(self.converted.values)}; {len(self.cases.target)} cases"
        )


# --- data sets ----------------------------------------------------------------------------------


def load(source: str, data: Path | None) -> Data:
    """The objects and the first two days of a source.

    Raises:
        LeadreError: the source's data or the text encoder are missing or malformed.
    """
    # The environment goes over arguments, so what is asked for goes there.
    os.environ[f"{ENV_PREFIX}SOURCE"] = source
    if data is not None:
        os.environ[f"{ENV_PREFIX}DATA"] = str(data)
    settings = load_settings(simulator=WORLD)
    made = open_source(settings)
    first, second = made.first_ds(), made.first_ds() + dt.timedelta(days=1)
    past, day = made.raw_day(first), made.raw_day(second)
    objects = marketing_objects(past["raw_ads"])
    events = [_events(raw, past["raw_ads"], objects) for raw in (past, day)]
    texts = map(ad_text, objects["title"].to_pylist(), objects["description"].to_pylist())
    return Data(
        settings,
        np.array(objects["marketing_object_id"].to_pylist()),
        embed(list(texts), settings.embedding, settings.cache),
        _categories(objects),
        _histories(events[0])[1],
        _histories(events[0].filter(pc.equal(events[0]["event_type"], "conversion")))[1],
        _cases(pa.concat_tables(events), second, settings),
    )


def _events(raw: dict[str, pa.Table], ads: pa.Table, objects: pa.Table) -> pa.Table:
    """Clicks and conversions on known ads, with the row of the object, each once, in order."""
    events = raw["raw_ad_events"]
    events = events.filter(pc.is_in(events["event_type"], pa.array(["click", "conversion"])))
    sold = ads["marketing_object_id"].take(pc.index_in(events["ad_id"], ads["ad_id"]))
    row = pc.index_in(sold, objects["marketing_object_id"])
    events = events.append_column("object", row).filter(pc.is_valid(row))
    once = np.unique(events["event_id"].to_numpy(), return_index=True)[1]
    columns = ["user_id", "event_time", "event_id", "event_type", "object"]
    return events.take(pa.array(once)).select(columns)


def _histories(events: pa.Table) -> tuple[pa.Array, Histories]:
    """Users, sorted, and the objects of each in order, each object where it first occurs."""
    keys = ("user_id", "event_time", "event_id")
    events = events.sort_by([(key, "ascending") for key in keys]).combine_chunks()
    users = events["user_id"].combine_chunks().dictionary_encode()
    user, row = users.indices.to_numpy().astype(np.int64), events["object"].to_numpy()
    first = np.sort(np.unique(user * (row.max(initial=0) + 1) + row, return_index=True)[1])
    offsets = np.searchsorted(user[first], np.arange(len(users.dictionary) + 1))
    return users.dictionary, Histories(offsets, row[first].astype(np.int64))


def _cases(events: pa.Table, day: dt.date, settings: Settings) -> Cases:
    """Conversions of a day by users with a history, on objects that they did not have before."""
    when = events["event_time"].cast(pa.date32())
    users, histories = _histories(events.filter(pc.less(when, day)))
    wanted = pc.and_(pc.equal(when, day), pc.equal(events["event_type"], "conversion"))
    if settings.examples.split_by == "prefix":
        wanted = pc.and_(wanted, pc.starts_with(events["user_id"], "valid-"))
    targets = events.filter(wanted).sort_by([("user_id", "ascending"), ("event_id", "ascending")])
    user = pc.fill_null(pc.index_in(targets["user_id"], users), -1).to_numpy()
    target = targets["object"].to_numpy().astype(np.int64)
    width = target.max(initial=0) + histories.values.max(initial=0) + 1
    had = np.isin(user * width + target, histories.cases * width + histories.values)
    kept = np.flatnonzero((user >= 0) & ~had)
    most = SIMULATED_CASES if settings.source == "simulator" else MOST_CASES
    if len(kept) > most:
        kept = np.sort(np.random.default_rng(settings.seed).choice(kept, most, replace=False))
    each = np.split(histories.values, histories.offsets[1:-1])
    return Cases(Histories.of(each[row] for row in user[kept]), target[kept])


def _categories(objects: pa.Table) -> Rows | None:
    codes = pc.fill_null(objects["category"], "").combine_chunks().dictionary_encode()
    return codes.indices.to_numpy().astype(np.int64) if len(codes.dictionary) > 1 else None


# --- measures -----------------------------------------------------------------------------------

Row = dict[str, Any]


def measure(data: Data, method: str, seed: int, steps: int) -> Row:
    """One method on one data set; what the keys mean is said above.

    Seconds are of this process's own computing, so that other work on the machine does not count.

    Raises:
        LeadreError: two objects have one ID, or one lost its ID to a frozen codebook.
    """
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    at_rest = peak_mb()
    settings = data.settings.semantic_ids.model_copy(update={"method": method})
    codebook, train_seconds = timed(lambda: train_codebook(data.vectors, settings, seed))
    (codes, full), encode_seconds = timed(lambda: _give(codebook, data, settings))
    peak = peak_mb()
    if len(np.unique(full, axis=0)) < len(full):
        raise LeadreError(f"{method}: objects share their whole Semantic ID")
    _say(f"{method}: codebook after {train_seconds:.1f} s, error {codebook.error:.4f}")
    usage, raw = code_usage(full, codebook.sizes), code_usage(codes, codebook.sizes)
    levels = usage["levels"]
    row = {
        "method": f"leadre {method}",
        "data": data.settings.source,
        "objects": len(full),
        "codes": f"{len(codebook.sizes)} x {codebook.sizes[0]}",
        "collision": usage["collision_rate"],
        "raw collision": raw["collision_rate"],
        "largest group": usage["largest_collision"],
        "level-1 used": levels[0]["used_share"],
        "used": [level["used"] for level in levels],
        "entropy": [level["entropy"] for level in levels],
        "error": float(codebook.errors(data.vectors, codes).mean()),
        **_category_agreement(codes, data.categories),
        "co-conversion lift": _follow_lift(data.converted, codes[:, 0]),
        **_kept(data, codebook, settings, seed),
        "train s": train_seconds,
        "encode s": encode_seconds,
        "at rest MB": at_rest,
        "peak MB": peak,
    }
    _say(f"{method}: collision {row['collision']:.4f}; now the model, {steps} steps")
    sizes = [*codebook.sizes, settings.collision_codes]
    row["HR@10"] = hit_rate(data.taken, data.cases, full, sizes, codebook, seed, steps)
    return row


def peak_mb() -> float:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and the seconds of computing that it took."""
    began = time.process_time()
    return work(), time.process_time() - began


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _give(
    codebook: Codebook,
    data: Data,
    settings: SemanticIdSettings,
    rows: Rows | slice = EVERY,
    previous: pa.Table | None = None,
) -> tuple[Codes, Codes]:
    """Codes and Semantic IDs of some objects, as `jobs.semantic_ids` gives them."""
    vectors, ids = data.vectors[rows], data.ids[rows].tolist()
    codes = codebook.encode(vectors)
    spare = codebook.alternatives(vectors, settings.alternatives)
    return codes, assign(ids, codes, previous, settings.collision_codes, spare)


def _category_agreement(codes: Codes, categories: Rows | None) -> dict[str, float | None]:
    """Of pairs of objects with equal first codes, the share of one category; and its lift."""
    result: dict[str, float | None] = {}
    for width in (1, 2):
        share = lift = None
        if categories is not None:
            group = np.unique(codes[:, :width], axis=0, return_inverse=True)[1].reshape(-1)
            both = group * (categories.max() + 1) + categories
            share = _pairs(both) / max(_pairs(group), 1)
            lift = share * _pairs(np.zeros_like(group)) / _pairs(categories)
        result |= {f"category {width}": share, f"category {width} lift": lift}
    return result


def _pairs(group: Rows) -> float:
    """How many pairs are of one group."""
    counts = np.unique(group, return_counts=True)[1].astype(np.float64)
    return float((counts * (counts - 1) / 2).sum())


def _follow_lift(histories: Histories, code: npt.NDArray[np.int32]) -> float:
    """How often neighbours in a history share a code, against two different objects by chance."""
    together = np.diff(histories.cases) == 0
    before, after = histories.values[:-1][together], histories.values[1:][together]
    drawn = np.bincount(np.concatenate([before, after]), minlength=len(code)) / (2 * len(before))
    itself = (drawn**2).sum()
    chance = ((np.bincount(code, drawn) ** 2).sum() - itself) / (1 - itself)
    return float((code[before] == code[after]).mean() / chance)


def _kept(data: Data, codebook: Codebook, settings: SemanticIdSettings, seed: int) -> Row:
    """Replace 5 % of the objects by others, and count what the rest keeps.

    Sizes stay those of `codebook`, though fewer objects are trained on.
    """
    settings = settings.model_copy(
        update={"levels": len(codebook.sizes), "codes": codebook.sizes[0]}
    )
    order = np.random.default_rng(seed).permutation(len(data.ids))[:CHURN_OBJECTS]
    count = round(CHURN * len(order))
    gone, come, stay = np.split(order, [count, 2 * count])
    before, after = np.concatenate([stay, gone]), np.concatenate([stay, come])
    old = train_codebook(data.vectors[before], settings, seed)
    _, given = _give(old, data, settings, before)
    ids = pa.array(data.ids[before], pa.string())
    lists = pa.array(list(given), pa.list_(pa.int32()))
    previous = pa.table({"marketing_object_id": ids, "codes": lists})
    _, later = _give(old, data, settings, after, previous)
    same = (later == given)[: len(stay)].all(1)
    if not same.all():
        raise LeadreError(f"{settings.method}: {(~same).sum()} objects lost their Semantic ID")
    free = np.arange(len(after)) >= len(stay)
    new = refit_codebook(old, data.vectors[after], later, free, settings, seed)
    vectors = data.vectors[stay]
    agree = (new.encode(vectors) == old.encode(vectors)).all(1)
    _say(f"{settings.method}: refreshed, {agree.mean():.4f} keep their nearest codes")
    return {"kept frozen": float(same.mean()), "kept refreshed": float(agree.mean())}


def mean_row(rows: list[Row]) -> Row:
    """The mean of each number over rows of other seeds."""
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    return {
        key: values[0] if all(v == values[0] for v in values) else np.mean(values, axis=0).tolist()
        for key, values in columns.items()
    }


# --- showing ------------------------------------------------------------------------------------


def shown(head: str, value: Any) -> str:
    """A value as the tables show it."""
    if value is None:
        return ""
    if isinstance(value, list):
        return " ".join(shown(head, part) for part in value)
    if isinstance(value, str | int):
        return str(value)
    return f"{value:.{DIGITS.get(head, 4)}f}"


def text_table(rows: list[Row]) -> str:
    """One column a row, since there are more measures than methods."""
    cells = [[head, *(shown(head, row[head]) for row in rows)] for head in rows[0]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    )


def plots(rows: list[Row]) -> str:
    """Bars of the main measures, one small plot each, as inline SVG."""
    figure = new_figure(11, 4.6)
    names = [row["method"].removeprefix("leadre ") for row in rows[::-1]]
    heads = [head for head in PLOTTED if rows[0][head] is not None]
    for place, head in enumerate(heads, 1):
        axes = figure.add_subplot(2, 4, place)
        values = [row[head] for row in rows[::-1]]
        bars = axes.barh(names, values, color="#2f6f9f")
        axes.bar_label(bars, [shown(head, value) for value in values], fontsize=8, padding=2)
        axes.margins(x=0.3)
        axes.set_title(head, fontsize=10)
        axes.tick_params(labelsize=8)
        if place % 4 != 1:
            axes.set_yticklabels([])
    return as_svg(figure)


def write_page(path: Path, sections: dict[str, tuple[str, list[Row]]]) -> None:
    """The HTML page: for each data set what it is, plots and the table."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    page = template.render(sections=sections, plots=plots, shown=shown, about=__doc__)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


# --- command ------------------------------------------------------------------------------------


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of Amazon reviews")
    parser.add_argument(
        "--source",
        action="append",
        choices=SOURCES,
        help="may be repeated; without it the simulator and, where a folder is given, amazon",
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", type=int, default=1, help="how many; the means are shown")
    parser.add_argument("--steps", type=int, default=500, help="of the small model's training")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    parser.add_argument("--html", type=Path, metavar="FILE", help="the page; else in the home")
    return parser


def alone(work: Callable[..., Any], *args: Any) -> Any:
    """The result of a call in a new process, whose peak of memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *args).result()


def run(args: argparse.Namespace) -> None:
    """Measure every method on every data set, one at a time; print and write what was found."""
    settings = load_settings()
    sources = args.source or (SOURCES if args.data or settings.data else SOURCES[1:])
    sections: dict[str, tuple[str, list[Row]]] = {}
    for source in sources:
        data: Data = alone(load, source, args.data)
        _say(f"{source}: {data.words}")
        seeds = range(data.settings.seed, data.settings.seed + args.seeds)
        rows = []
        for method in args.methods:
            found = [alone(measure, data, method, seed, args.steps) for seed in seeds]
            rows.append(mean_row(found))
        sections[source] = (data.words, rows)
        print(f"\n{source}: {data.words}\n{text_table(rows)}", flush=True)
    page = args.html or settings.home / "benchmarks" / "semantic_ids.html"
    write_page(page, sections)
    if args.json:
        every = [row for _, rows in sections.values() for row in rows]
        args.json.write_text(json.dumps(every, indent=1) + "\n", encoding="utf-8")
    print(f"\npage: {page}")


def main() -> None:
    """Run; an error of ours is said in a line."""
    args = arguments().parse_args()
    try:
        run(args)
    except LeadreError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
