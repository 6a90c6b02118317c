"""What each part of the method is worth: variants that leave one out, over several seeds.

    python -m benchmarks.ablation --seeds 3 --only without-long-term,dpo-pairwise

Every variant runs as `full` does but for the settings that `VARIANTS` names, on the same days,
cases and seeds (see `chain`); what variants have in common is made once. A cell of the first table
is the mean over the seeds ± their standard deviation. The second says variant less `full` on the
same cases, all seeds together, ± half the 95 % interval of that difference over the users (see
`seeds.paired`); that another training would have come out otherwise is not in it. So with several
seeds a third says variant less `full`, seed by seed, ± half the 95 % interval over the seeds
(Student's t).

`full` and the variants that leave something out are the stage that validation cases chose
(`leadre`); `sft-only` and the two of DPO are that stage, whatever was chosen. A part that a source
does not have, such as content on MovieLens, is worth nothing there. A source without eCPM has no
DPO.

Runs that are done are passed over; after an interruption the same command goes on where it stopped
(without `--force`, which redoes all). The runs go seed by seed: to see those that are done, ask for
fewer `--seeds`, or for some variants with `--only`. The page is that of the latest command.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from benchmarks import chain
from benchmarks.page import Sheet, as_svg, new_figure, write_page
from benchmarks.quality import FULL, arguments, results_sheet
from benchmarks.seeds import (
    Method,
    Paired,
    as_json,
    in_order,
    metric_names,
    over_seeds,
    paired,
    plus_minus,
    with_stages,
    written_as,
)
from leadre_lib.errors import LeadreError

PLOTTED = ("HR@10", "NDCG@10", "eCPM-weighted HR@10")


@dataclass(frozen=True)
class Variant:
    """Settings that differ from those of the caller, by dotted name, and what that leaves out.

    `row`: the method of the results table that it is about.
    """

    about: str
    settings: Mapping[str, str] = field(default_factory=dict)
    row: str = "leadre"


VARIANTS = {
    FULL: Variant("nothing"),
    "without-profile": Variant("who the user is", {"prompt.profile": "false"}),
    "without-long-term": Variant("long-term interests", {"prompt.long_term": "false"}),
    "without-short-term": Variant("recent behaviours", {"prompt.short_term": "false"}),
    "without-content": Variant("content in both interests", {"prompt.content": "false"}),
    "without-titles-to-sid": Variant(
        "histories told by titles", {"examples.task_weights.titles_to_sid": "0"}
    ),
    "without-next-category": Variant(
        "the category of the next ad", {"examples.task_weights.next_category": "0"}
    ),
    "without-text-to-sid": Variant(
        "Semantic ID of a text", {"examples.task_weights.text_to_sid": "0"}
    ),
    "without-sid-to-text": Variant(
        "text of a Semantic ID", {"examples.task_weights.sid_to_text": "0"}
    ),
    "without-synthetic-next-ad": Variant(
        "synthetic histories", {"examples.task_weights.synthetic_next_ad": "0"}
    ),
    "without-value-weights": Variant(
        "weights by eCPM and of clicks",
        {"examples.value_power": "0", "examples.click_weight": "1"},
    ),
    "sft-only": Variant("DPO", row="leadre-sft"),
    "dpo-pairwise": Variant("lists of rejected ads", {"dpo.loss": "pairwise"}, "leadre-dpo"),
    "dpo-listwise": Variant("the choice of a stage", {"dpo.loss": "listwise"}, "leadre-dpo"),
}
NO_BASELINE = {"sasrec.epochs": "0"}  # the dear one; that of `full` is enough


def chosen(only: str | None) -> dict[str, Variant]:
    """The variants of `--only`, always with `full`.

    Raises:
        LeadreError: there is no such variant.
    """
    if only is None:
        return VARIANTS
    names = [name.strip() for name in only.split(",") if name.strip()]
    for name in names:
        if name not in VARIANTS:
            raise LeadreError(f"--only {name}: no such variant; there are {', '.join(VARIANTS)}")
    return {name: VARIANTS[name] for name in VARIANTS if name in {FULL, *names}}


def run_of(variant: Variant, name: str, seed: int) -> chain.Run:
    """The run that a variant's row comes from; that of `full` where nothing differs from it."""
    full = chain.Run.of(FULL, {}, seed)
    own = chain.Run.of(name, variant.settings, seed)
    if own.settings == full.settings:
        return full
    return chain.Run.of(name, {**variant.settings, **NO_BASELINE}, seed)


def rows_of(
    variants: Mapping[str, Variant], tables: Mapping[str, Sequence[Sequence[chain.Row]]]
) -> list[Method]:
    """Each variant's row over the seeds; without those whose stage was not trained in each seed.

    Args:
        variants: by name.
        tables: by the same names, a results table a seed.
    """
    found = []
    for name, variant in variants.items():
        rows = [with_stages(table).get(variant.row) for table in tables[name]]
        trained = [row for row in rows if row is not None]
        if len(trained) == len(rows):
            found.append(over_seeds(name, trained))
    return found


def gaps_of(
    rows: Sequence[Method],
    variants: Mapping[str, Variant],
    ranks: Mapping[str, Sequence[pa.Table]],
) -> dict[str, dict[str, Paired]]:
    """Each variant less full by metric, case by case; of variants that have a row.

    Args:
        rows: `rows_of` the variants.
        variants: by name.
        ranks: by the same names, a table of `case_ranks` a seed.
    """

    def own(name: str) -> list[pa.Table]:
        """The ranks of the variant's stage in each seed."""
        tables = []
        for table in ranks[name]:
            stage = written_as(variants[name].row, table["method"].unique().to_pylist())
            tables.append(table.filter(pc.equal(table["method"], stage)))
        return tables

    full = own(rows[0].name)
    return {row.name: paired(own(row.name), full) for row in rows[1:]}


def differences_sheet(
    gaps: Mapping[str, Mapping[str, Paired]], variants: Mapping[str, Variant]
) -> Sheet:
    """Variant less full, with 95 % intervals over the cases."""
    names = in_order({metric for each in gaps.values() for metric in each})
    lines = [
        [
            name,
            *(
                plus_minus(each[m].mean, each[m].half, sign=True) if m in each else "-"
                for m in names
            ),
            variants[name].about,
        ]
        for name, each in gaps.items()
    ]
    return Sheet("difference to full ± 95 % over cases", ["variant", *names, "leaves out"], lines)


def seeds_sheet(rows: Sequence[Method]) -> Sheet:
    """Variant less full, seed by seed, with 95 % intervals over the seeds."""
    full, names = rows[0].metrics, metric_names(rows)
    lines = []
    for row in rows[1:]:
        gaps = [row.metrics[m].minus(full[m]) if m in row.metrics else None for m in names]
        cells = [plus_minus(gap.mean, gap.half, sign=True) if gap else "-" for gap in gaps]
        lines.append([row.name, *cells])
    return Sheet("difference to full ± 95 % over seeds", ["variant", *names], lines)


def as_rows(
    rows: Sequence[Method],
    gaps: Mapping[str, Mapping[str, Paired]],
    variants: Mapping[str, Variant],
) -> list[chain.Row]:
    """The JSON: as that of `quality`, with the differences to full and their intervals."""
    made = []
    for row in rows:
        told = {**as_json(row), "leaves out": variants[row.name].about}
        for name, gap in gaps.get(row.name, {}).items():
            told[f"{name} diff"] = round(gap.mean, 9)
            told[f"{name} diff low"] = round(gap.mean - gap.half, 9)
            told[f"{name} diff high"] = round(gap.mean + gap.half, 9)
        made.append(told)
    return made


def plot(gaps: Mapping[str, Mapping[str, Paired]]) -> str:
    """Differences to full with their intervals over the cases, a small plot a metric."""
    variants = list(gaps)[::-1]
    names = [name for name in PLOTTED if any(name in each for each in gaps.values())]
    figure = new_figure(12, 1.0 + 0.3 * len(variants))
    for place, name in enumerate(names, 1):
        axes = figure.add_subplot(1, len(names), place)
        having = [variant for variant in variants if name in gaps[variant]]
        axes.axvline(0, color="#55636f", linewidth=1)
        axes.errorbar(
            [gaps[variant][name].mean for variant in having],
            having,
            xerr=[gaps[variant][name].half for variant in having],
            fmt="o",
            color="#2f6f9f",
            capsize=3,
        )
        axes.set_title(f"{name}, less full", fontsize=10)
        axes.tick_params(labelsize=8)
        axes.grid(axis="x", alpha=0.25)
        if place > 1:
            axes.set_yticklabels([])
    return as_svg(figure)


def run(args: argparse.Namespace) -> None:
    """Run all variants and seeds; print and write what came out."""
    began = time.monotonic()
    chain.check_output(args.json)
    variants = chosen(args.only)
    base = chain.base_settings(args.source, args.data)
    bench = chain.Chain(base, args.days)
    seeds = range(base.seed, base.seed + args.seeds)
    # Seed by seed: whoever stops early has all variants of the first seeds.
    wanted = [(name, seed) for seed in seeds for name in variants]
    runs = [run_of(variants[name], name, seed) for name, seed in wanted]
    found = dict(zip(wanted, bench.complete(runs, args.force), strict=True))
    rows = rows_of(variants, {name: [found[name, seed] for seed in seeds] for name in variants})
    made = dict(zip(wanted, runs, strict=True))
    ranks = {row.name: [bench.ranks(made[row.name, seed]) for seed in seeds] for row in rows}
    gaps = gaps_of(rows, variants, ranks)
    words = chain.about(bench, args.seeds)
    results = results_sheet(rows, f"test cases of {words}", "variant")
    sheets = [results, differences_sheet(gaps, variants)]
    if args.seeds > 1:
        sheets.append(seeds_sheet(rows))
    for sheet in sheets:
        sheet.show(chain.console)
    for name in sorted(set(variants) - {row.name for row in rows}):
        chain.console.print(f"{name}: left out, as in some seed there were no pairs for DPO")
    page = bench.root / "ablation.html"
    write_page(page, "Ablation", f"{words}.", plot(gaps), sheets, __doc__)
    if args.json is not None:
        args.json.write_text(json.dumps(as_rows(rows, gaps, variants), indent=1) + "\n", "utf-8")
    chain.console.print(f"page: {page}", markup=False)
    chain.console.print(f"done in {time.monotonic() - began:.0f} s")


def command_line() -> argparse.ArgumentParser:
    """The command line."""
    parser = arguments(__doc__)
    parser.add_argument("--only", metavar="NAME,NAME", help=f"of {', '.join(VARIANTS)}")
    return parser


if __name__ == "__main__":
    chain.say_errors(run, command_line().parse_args())
