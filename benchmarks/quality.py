"""All methods on the cases of one day, over several seeds: who finds the ad that a user wanted.

    python -m benchmarks.quality --seeds 3 --json quality.json

Runs the jobs of the chain for every seed (see `chain`: the model is trained from scratch for the
newest day) and prints one table. A cell is the mean over the seeds ± their standard deviation,
fractions as fractions:

- `HR@k`, `NDCG@k`: of the test cases, every method ranking all active marketing objects.
- `coverage`: share of the active objects that some list of ten holds.
- `eCPM-weighted HR@10`: each case weighs what its ad is worth; only where ads have an eCPM.

`leadre-fused` is what is served, `leadre-signals` the same without a model. `leadre` is the model
alone, of the stage that validation cases chose in each seed, `leadre-sft` the model before DPO and
`leadre-dpo` the one after it, where they differ from `leadre`.

A second table says who is first in each column, and sets the best of our rows against the best of
all others: with the 95 % interval of our value by the number of cases (binomial, Wilson; for NDCG
the most that it can be), and the difference with its 95 % interval over seeds (Student's t, seed by
seed).

Seeds that are done are passed over; after an interruption the same command goes on where it
stopped (without `--force`, which redoes all).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import chain
from benchmarks.page import Sheet, as_svg, new_figure, write_page
from benchmarks.seeds import (
    OURS,
    Method,
    as_json,
    binomial_interval,
    methods,
    metric_names,
    plus_minus,
)

FULL = "full"
SOURCES = ("simulator", "movielens", "amazon")


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least 1")
    return number


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The command line of this benchmark and of the ablation."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", choices=SOURCES, help="else that of the settings")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of Amazon reviews")
    parser.add_argument("--seeds", type=positive, default=3, help="how many (default: 3)")
    parser.add_argument(
        "--days", type=positive, default=2, help="after the initial load (default: 2)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    parser.add_argument("--force", action="store_true", help="redo what is done")
    return parser


def results_sheet(rows: Sequence[Method], title: str, head: str = "method") -> Sheet:
    """One row a method, or what `head` calls it, one column a metric."""
    names = metric_names(rows)
    return Sheet(
        title,
        [head, *names, "seeds", "cases"],
        [
            [
                row.name,
                *(
                    plus_minus(row.metrics[name].mean, row.metrics[name].sd)
                    if name in row.metrics
                    else "-"
                    for name in names
                ),
                str(row.seeds),
                str(row.cases),
            ]
            for row in rows
        ],
    )


def first_sheet(rows: Sequence[Method]) -> Sheet:
    """Who is first in each metric, and our best row against the best of the others."""
    lines = []
    for name in metric_names(rows):
        having = sorted(
            (row for row in rows if name in row.metrics), key=lambda row: -row.metrics[name].mean
        )
        ours = [row for row in having if row.name.startswith(OURS)][:1]
        others = [row for row in having if not row.name.startswith(OURS)][:1]
        line = [name, having[0].name]
        for own in ours:
            mean = own.metrics[name].mean
            ends = binomial_interval(name, mean, own.cases)
            within = "-" if ends is None else "{:.4f} to {:.4f}".format(*ends)
            line += [own.name, f"{mean:.4f}", within]
            for other in others:
                gap = own.metrics[name].minus(other.metrics[name])
                line += [
                    other.name,
                    f"{other.metrics[name].mean:.4f}",
                    plus_minus(gap.mean, gap.half, sign=True),
                ]
        lines.append(line + ["-"] * (8 - len(line)))
    heads = ["metric", "first", "our best", "ours", "95 % by cases", "best other", "other"]
    return Sheet("who is first", [*heads, "ours - other ± 95 % over seeds"], lines)


def plot(rows: Sequence[Method]) -> str:
    """A small plot a metric, bars with the seeds' standard deviation (of one seed none)."""
    names = metric_names(rows)
    columns = 4
    height = -(-len(names) // columns) * (0.6 + 0.28 * len(rows))
    figure = new_figure(12, height)
    for place, name in enumerate(names, 1):
        axes = figure.add_subplot(-(-len(names) // columns), columns, place)
        having = [row for row in rows[::-1] if name in row.metrics]
        axes.barh(
            [row.name for row in having],
            [row.metrics[name].mean for row in having],
            xerr=[row.metrics[name].sd or 0.0 for row in having],
            color=["#2f6f9f" if row.name.startswith(OURS) else "#b8c4cd" for row in having],
            ecolor="#1d2730",
            capsize=2,
        )
        axes.set_title(name, fontsize=10)
        axes.tick_params(labelsize=8)
        if place % columns != 1:
            axes.set_yticklabels([])
    return as_svg(figure)


def run(args: argparse.Namespace) -> None:
    """Run the seeds; print and write what came out."""
    began = time.monotonic()
    chain.check_output(args.json)
    base = chain.base_settings(args.source, args.data)
    seeds = range(base.seed, base.seed + args.seeds)
    bench = chain.Chain(base, args.days)
    tables = bench.complete([chain.Run.of(FULL, {}, seed) for seed in seeds], args.force)
    rows = methods(tables)
    words = chain.about(bench, args.seeds)
    sheets = [results_sheet(rows, f"test cases of {words}"), first_sheet(rows)]
    for sheet in sheets:
        sheet.show(chain.console)
    page = bench.root / "quality.html"
    write_page(page, "Quality", f"{words}.", plot(rows), sheets, __doc__)
    if args.json is not None:
        args.json.write_text(json.dumps(list(map(as_json, rows)), indent=1) + "\n", "utf-8")
    chain.console.print(f"page: {page}", markup=False)
    chain.console.print(f"done in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    chain.say_errors(run, arguments(__doc__).parse_args())
