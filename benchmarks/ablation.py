"""What each part of the method is worth: variants that leave one out, over several seeds.

    python -m benchmarks.ablation --seeds 3 --only without-long-term,dpo-pairwise

Every variant runs as `full` does but for the settings that `VARIANTS` names, on the same days,
cases and seeds (see `chain`); what variants have in common is made once. A cell of the first table
is the mean over the seeds ± their standard deviation. The second says variant less `full`, seed by
seed, ± half the 95 % interval of that difference over the seeds (Student's t); with one seed there
is none. The cases are a sample too: the note below gives the binomial standard error of `full`. As
all variants are asked the same cases, their differences err less than that.

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

from benchmarks import chain
from benchmarks.page import Sheet, as_svg, new_figure, write_page
from benchmarks.quality import FULL, arguments, results_sheet
from benchmarks.seeds import (
    Method,
    Over,
    as_json,
    binomial_error,
    metric_names,
    over_seeds,
    plus_minus,
    with_stages,
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


def differences_sheet(rows: Sequence[Method], variants: Mapping[str, Variant]) -> Sheet:
    """Variant less full, with 95 % intervals over the seeds."""
    full = rows[0]
    names = metric_names(rows)
    lines = []
    for row in rows[1:]:
        cells = [
            plus_minus(gap.mean, gap.half, sign=True)
            if (gap := difference(row, full, name))
            else "-"
            for name in names
        ]
        lines.append([row.name, *cells, variants[row.name].about])
    return Sheet("difference to full ± 95 % over seeds", ["variant", *names, "leaves out"], lines)


def difference(row: Method, full: Method, metric: str) -> Over | None:
    """Variant less full, seed by seed; None where one of them lacks the metric."""
    if metric not in row.metrics or metric not in full.metrics:
        return None
    return row.metrics[metric].minus(full.metrics[metric])


def note(full: Method) -> str:
    """The error that comes from the number of cases."""
    errors = [
        f"{name} {error:.4f}"
        for name in metric_names([full])
        if (error := binomial_error(name, full.metrics[name].mean, full.cases)) is not None
    ]
    return (
        f"binomial standard error of full over {full.cases} cases: {', '.join(errors)}"
        " (of NDCG the most that it can be)"
    )


def as_rows(rows: Sequence[Method], variants: Mapping[str, Variant]) -> list[chain.Row]:
    """The JSON: as that of `quality`, with the differences to full and their 95 % intervals."""
    full = rows[0]
    made = []
    for row in rows:
        told = {**as_json(row), "leaves out": variants[row.name].about}
        for name in row.metrics:
            gap = difference(row, full, name)
            if row is full or gap is None:
                continue
            told[f"{name} diff"] = round(gap.mean, 9)
            if gap.half is not None:
                told[f"{name} diff low"] = round(gap.mean - gap.half, 9)
                told[f"{name} diff high"] = round(gap.mean + gap.half, 9)
        made.append(told)
    return made


def plot(rows: Sequence[Method]) -> str:
    """Differences to full with their intervals, a small plot a metric."""
    full, others = rows[0], rows[:0:-1]
    names = [name for name in PLOTTED if name in full.metrics]
    figure = new_figure(12, 1.0 + 0.3 * len(others))
    for place, name in enumerate(names, 1):
        axes = figure.add_subplot(1, len(names), place)
        gaps = [difference(row, full, name) for row in others]
        axes.axvline(0, color="#55636f", linewidth=1)
        axes.errorbar(
            [float("nan") if gap is None else gap.mean for gap in gaps],
            [row.name for row in others],
            xerr=[0.0 if gap is None else gap.half or 0.0 for gap in gaps],
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
    words = chain.about(bench, args.seeds)
    sheets = [
        results_sheet(rows, f"test cases of {words}", "variant"),
        differences_sheet(rows, variants),
    ]
    for sheet in sheets:
        sheet.show(chain.console)
    chain.console.print(note(rows[0]))
    for name in sorted(set(variants) - {row.name for row in rows}):
        chain.console.print(f"{name}: left out, as in some seed there were no pairs for DPO")
    page = bench.root / "ablation.html"
    write_page(page, "Ablation", f"{words}; {note(rows[0])}.", plot(rows), sheets, __doc__)
    if args.json is not None:
        args.json.write_text(json.dumps(as_rows(rows, variants), indent=1) + "\n", "utf-8")
    chain.console.print(f"page: {page}", markup=False)
    chain.console.print(f"done in {time.monotonic() - began:.0f} s")


def command_line() -> argparse.ArgumentParser:
    """The command line."""
    parser = arguments(__doc__)
    parser.add_argument("--only", metavar="NAME,NAME", help=f"of {', '.join(VARIANTS)}")
    return parser


if __name__ == "__main__":
    chain.say_errors(run, command_line().parse_args())
