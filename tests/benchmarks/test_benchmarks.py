"""The parts of the benchmarks that train nothing: settings, what is shared, statistics, tables."""

from __future__ import annotations

import datetime as dt
import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from benchmarks import ablation, chain, page, quality, seeds
from leadre_lib.errors import LeadreError
from leadre_lib.settings import REPOSITORY, SettingsError, load_settings

SEED = 7


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> chain.Chain:
    monkeypatch.setenv("LEADRE_HOME", str(tmp_path))
    monkeypatch.setenv("LEADRE_SIMULATOR__USERS", "20")
    return chain.Chain(load_settings())


def run(changes: Mapping[str, str], seed: int = SEED) -> chain.Run:
    return chain.Run.of("variant", changes, seed)


def row(method: str, hits: float, cases: int = 100, **more: float) -> chain.Row:
    return {"method": method, "HR@10": hits, "coverage": 0.5, "cases": cases, **more}


# --- chain --------------------------------------------------------------------------------------


def test_changes_go_over_the_environment_and_leave_it_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LEADRE_DPO__LOSS", "listwise")
    made = run({"dpo.loss": "pairwise", "examples.task_weights.sid_to_text": "0"})
    assert made.settings.dpo.loss == "pairwise"
    assert made.settings.examples.task_weights.sid_to_text == 0
    assert made.settings.seed == SEED
    assert load_settings().dpo.loss == "listwise"


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"prompt.colour": "red"}, "PROMPT__COLOUR"), ({"dpo.loss": "none"}, "dpo.loss")],
)
def test_a_variant_with_a_bad_setting_is_refused(changes: dict[str, str], told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        run(changes)


@pytest.mark.parametrize(
    ("changes", "shared"),
    [
        ({"dpo.loss": "pairwise"}, ["data", "ids", "sft"]),
        ({"sasrec.epochs": "0"}, ["data", "ids", "sft"]),
        ({"prompt.long_term": "false"}, ["data", "ids"]),
        ({"examples.task_weights.sid_to_text": "0"}, ["data", "ids"]),
        ({"examples.synthetic_per_ad": "0"}, ["data"]),
        ({"semantic_ids.method": "rq-vae"}, ["data"]),
        ({"interests.window_days": "3"}, []),
        ({"inference.shards": "5"}, ["data", "ids", "sft", "result"]),
    ],
)
def test_runs_share_the_homes_whose_jobs_read_no_setting_that_differs(
    bench: chain.Chain, changes: dict[str, str], shared: list[str]
) -> None:
    plain, other = run({}), run(changes)
    same = [name for name in chain.UNREAD if bench.digest(plain, name) == bench.digest(other, name)]
    assert same == shared


def test_a_seed_shares_the_raw_days_and_nothing_else(
    bench: chain.Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = bench.homes(run({}, 1)), bench.homes(run({}, 2))
    assert [a.path == b.path for a, b in zip(first, second, strict=True)] == [True] + [False] * 3
    monkeypatch.setenv("LEADRE_SEED", "99")  # another world
    other = chain.Chain(load_settings())
    assert other.digest(run({}, 1), "data") != bench.digest(run({}, 1), "data")


def test_other_code_makes_everything_anew(
    bench: chain.Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = bench.digest(run({}), "data")
    monkeypatch.setattr(chain, "code_digest", lambda: "other")
    assert bench.digest(run({}), "data") != before


def test_the_newest_day_alone_is_trained_on(bench: chain.Chain) -> None:
    steps = [step for home in bench.homes(run({})) for step in home.steps]
    assert len(steps) == len(set(steps))
    assert [ds for ds, job in steps if job == "curate"] == bench.dates
    assert [ds for ds, job in steps if job == "sft"] == [bench.ds]
    assert bench.ds == bench.base.simulator.first_ds + dt.timedelta(days=2)


def test_time_left_counts_what_runs_share_once(bench: chain.Chain) -> None:
    plain, pairwise = run({}), run({"dpo.loss": "pairwise"})
    assert bench.seconds_left([plain]) is None
    bench.seconds = {job.name: [1.0, 3.0] for job in chain.JOBS}
    steps = sum(len(home.steps) for home in bench.homes(plain))
    assert bench.seconds_left([plain]) == 2 * steps
    last = bench.homes(pairwise)[-1]
    assert bench.seconds_left([plain, pairwise]) == 2 * (steps + len(last.steps))


def test_a_finished_run_is_not_made_again(bench: chain.Chain) -> None:
    made = run({})
    path = bench.root / "results" / f"{bench.digest(made, 'result')}.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"rows": [row("leadre", 0.5)], "seconds": {f"{bench.ds} sft": 9.0}}))
    assert bench.complete([made, made]) == [[row("leadre", 0.5)]] * 2
    assert not (bench.root / "homes").exists()
    assert bench.seconds == {"sft": [9.0]}


def test_a_job_that_fails_is_named_with_its_log_and_is_not_done(
    bench: chain.Chain, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LEADRE_QUALITY__VOLUME_RATIO", "0.5")  # bad, but only the job sees it
    made = chain.Run("bad", SEED, bench.base, {})
    with pytest.raises(LeadreError, match=r"land of bad, seed 7, 2026-03-02 failed.*land\.log"):
        bench.complete([made])
    assert "quality.volume_ratio" in capsys.readouterr().out
    home = bench.homes(made)[0]
    assert home.missing() == list(home.steps)


def test_a_home_of_other_code_goes(bench: chain.Chain) -> None:
    for name, code in (("data-old", "other"), ("data-new", chain.code_digest())):
        folder = bench.root / "homes" / name
        folder.mkdir(parents=True)
        (folder / "done.json").write_text(json.dumps({"code": code, "seconds": {}}))
    (bench.root / "homes" / "ids-new.partial").mkdir()
    bench._remove_others_homes()
    assert [path.name for path in (bench.root / "homes").iterdir()] == ["data-new"]


# --- seeds --------------------------------------------------------------------------------------


def test_the_interval_is_that_of_a_t_test() -> None:
    values = np.array([0.11, 0.14, 0.12, 0.19])
    over = seeds.Over(tuple(values))
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert over.half is not None
    assert over.mean - over.half == pytest.approx(expected.low)
    assert over.mean + over.half == pytest.approx(expected.high)
    assert over.sd == pytest.approx(values.std(ddof=1))
    alone = seeds.Over((0.3,))
    assert (alone.mean, alone.sd, alone.half) == (0.3, None, None)


def test_differences_are_taken_seed_by_seed() -> None:
    gap = seeds.Over((0.3, 0.5, 0.7)).minus(seeds.Over((0.2, 0.4, 0.6)))
    assert gap.mean == pytest.approx(0.1)
    assert gap.sd == pytest.approx(0)


@pytest.mark.parametrize(("hits", "cases"), [(0, 18), (13, 100), (653, 653)])
def test_the_binomial_interval_is_wilsons(hits: int, cases: int) -> None:
    expected = stats.binomtest(hits, cases).proportion_ci(0.95, method="wilson")
    found = seeds.binomial_interval("HR@10", hits / cases, cases)
    assert found == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert seeds.binomial_interval("coverage", 0.5, cases) is None


def test_stages_have_their_own_names_whichever_challenged() -> None:
    dpo_won = seeds.with_stages([row("leadre", 0.3), row("leadre-sft", 0.2)])
    sft_won = seeds.with_stages([row("leadre", 0.2), row("leadre-dpo", 0.1)])
    alone = seeds.with_stages([row("leadre", 0.2)])
    assert {name: entry["HR@10"] for name, entry in dpo_won.items()} == {
        "leadre": 0.3,
        "leadre-sft": 0.2,
        "leadre-dpo": 0.3,
    }
    assert (sft_won["leadre-sft"]["HR@10"], sft_won["leadre-dpo"]["HR@10"]) == (0.2, 0.1)
    assert alone["leadre-sft"]["HR@10"] == 0.2
    assert "leadre-dpo" not in alone


def test_a_stage_that_is_leadre_in_every_seed_is_said_once() -> None:
    tables = [
        [row("popularity", 0.1), row("leadre", 0.3), row("leadre-sft", 0.2)],
        [row("popularity", 0.1), row("leadre", 0.5), row("leadre-sft", 0.1)],
    ]
    rows = {method.name: method for method in seeds.methods(tables)}
    assert list(rows) == ["leadre", "leadre-sft", "popularity"]
    assert rows["leadre"].metrics["HR@10"].mean == pytest.approx(0.4)
    tables[1] = [row("popularity", 0.1), row("leadre", 0.5), row("leadre-dpo", 0.1)]
    names = [method.name for method in seeds.methods(tables)]
    assert names == ["leadre", "leadre-sft", "leadre-dpo", "popularity"]


def test_metrics_come_in_the_order_of_the_results_table() -> None:
    metrics = {"coverage": 1.0, "HR@3": 0.0, "HR@1": 0.0, "HR@10": None}
    made = seeds.over_seeds("x", [{"method": "x", **metrics, "cases": 3}])
    assert seeds.metric_names([made]) == ["HR@1", "HR@3", "coverage"]


def test_json_holds_means_and_deviations() -> None:
    tables = [[row("leadre", 0.2, 90)], [row("leadre", 0.4, 110)]]
    (found,) = map(seeds.as_json, seeds.methods(tables))
    assert found["method"] == "leadre"
    assert found["HR@10"] == pytest.approx(0.3)
    assert found["HR@10 sd"] == pytest.approx(np.std([0.2, 0.4], ddof=1))
    assert (found["seeds"], found["cases"]) == (2, 100)


# --- commands -----------------------------------------------------------------------------------


def test_the_first_of_a_column_and_our_distance_from_it() -> None:
    tables = [
        [row("leadre", 0.30), row("leadre-sft", 0.2), row("item-knn", 0.25), row("popularity", 0.1)]
        for _ in range(3)
    ]
    sheet = quality.first_sheet(seeds.methods(tables))
    lines = {line[0]: dict(zip(sheet.heads, line, strict=True)) for line in sheet.rows}
    assert lines["HR@10"]["first"] == "leadre"
    assert lines["HR@10"]["best other"] == "item-knn"
    assert lines["HR@10"]["ours - other ± 95 % over seeds"].startswith("+0.0500")
    assert lines["coverage"]["95 % by cases"] == "-"


@pytest.mark.parametrize("name", ablation.VARIANTS)
@pytest.mark.parametrize("source", quality.SOURCES)
def test_variants_are_valid_and_differ_from_full(
    name: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEADRE_SOURCE", source)
    variant = ablation.VARIANTS[name]
    made, full = ablation.run_of(variant, name, SEED), chain.Run.of("full", {}, SEED)
    same_run = made.settings == full.settings
    assert same_run == (not variant.settings or name == "dpo-listwise")
    assert same_run or made.settings.sasrec.epochs == 0


def test_only_takes_known_variants_and_always_full() -> None:
    assert list(ablation.chosen("sft-only, without-profile")) == [
        "full",
        "without-profile",
        "sft-only",
    ]
    with pytest.raises(LeadreError, match=r"--only without-sense: .*without-profile"):
        ablation.chosen("without-sense")


def test_ablation_compares_the_stage_of_each_variant_with_full() -> None:
    names = ["full", "sft-only", "dpo-pairwise", "without-profile"]
    variants = {name: ablation.VARIANTS[name] for name in names}
    full = [[row("leadre", 0.3 + n / 10), row("leadre-sft", 0.2)] for n in range(2)]
    tables = {
        "full": full,
        "sft-only": full,
        "dpo-pairwise": [[row("leadre", 0.25)], [row("leadre", 0.25)]],  # no DPO at all
        "without-profile": [[row("leadre", 0.1)], [row("leadre", 0.2)]],
    }
    rows = ablation.rows_of(variants, tables)
    assert [entry.name for entry in rows] == ["full", "sft-only", "without-profile"]
    of_full = {"leadre": [1, None, 3, None], "leadre-sft": [None, None, 3, 11]}
    ranks = {"full": [ranks_of(of_full)] * 2, "sft-only": [ranks_of(of_full)] * 2}
    ranks["without-profile"] = [ranks_of({"leadre": [1, 2, 3, 4]})] * 2
    gaps = ablation.gaps_of(rows, variants, ranks)
    assert gaps["sft-only"]["HR@10"].mean == pytest.approx(-0.25)
    assert gaps["without-profile"]["HR@10"].mean == pytest.approx(0.5)
    told = {entry["method"]: entry for entry in ablation.as_rows(rows, gaps, variants)}
    assert "HR@10 diff" not in told["full"]
    assert told["sft-only"]["HR@10"] == pytest.approx(0.2)
    low, high = (told["sft-only"][f"HR@10 diff {end}"] for end in ("low", "high"))
    assert (low + high) / 2 == pytest.approx(-0.25)
    assert low < high
    sheet = ablation.differences_sheet(gaps, variants)
    assert [line[0] for line in sheet.rows] == ["sft-only", "without-profile"]
    by_seed = {line[0]: line for line in ablation.seeds_sheet(rows).rows}
    place = ["variant", *seeds.metric_names(rows)].index("HR@10")
    assert by_seed["without-profile"][place].startswith("-0.2000 ± 0.0000")


def ranks_of(
    methods: dict[str, list[float | None]], ecpm: float | None = 2.0, prefix: str = "case"
) -> pa.Table:
    """Rows of `case_ranks`: the places of each method's cases, two of which are one user's."""
    return pa.Table.from_pylist(
        [
            {"method": method, "case_id": f"{prefix}-{n}", "user_id": f"user-{n // 2}"}
            | {"rank": place and float(place), "target_ecpm": ecpm}
            for method, places in methods.items()
            for n, place in enumerate(places)
        ],
        pa.schema(
            [(name, pa.string()) for name in ("method", "case_id", "user_id")]
            + [(name, pa.float64()) for name in ("rank", "target_ecpm")]
        ),
    )


def test_paired_differences_have_the_error_of_users() -> None:
    rng = np.random.default_rng(0)
    own, other = (rng.integers(1, 21, 400).tolist() for _ in range(2))
    one, two = ranks_of({"leadre": own}), ranks_of({"leadre": other})
    shuffled = two.take(pa.array(rng.permutation(400)))
    found = seeds.paired([one], [shuffled])["HR@10"]
    gap = (np.array(own) <= 10).astype(float) - (np.array(other) <= 10)
    assert found.mean == pytest.approx(gap.mean())
    of_users = gap.reshape(200, 2).mean(axis=1)
    assert found.half == pytest.approx(1.96 * of_users.std() / math.sqrt(200), rel=1e-4)
    # The same users asked again are no news.
    assert seeds.paired([one, one], [two, two])["HR@10"].half == pytest.approx(found.half)
    assert seeds.paired([one], [one])["NDCG@10"] == seeds.Paired(0.0, 0.0)


def test_paired_values_weigh_by_ecpm_and_only_the_same_cases_are_compared() -> None:
    cheap, dear = ranks_of({"x": [1, None]}, 1.0, "cheap"), ranks_of({"x": [None, 1]}, 9.0, "dear")
    none = ranks_of({"x": [1, 1]}, None, "free")
    own = pa.concat_tables([cheap, dear, none])
    other = own.set_column(3, "rank", pa.array([None] * 6, pa.float64()))
    value = seeds.paired([own], [other])["eCPM-weighted HR@10"]
    assert value.mean == pytest.approx(10 / 20)
    assert "eCPM-weighted HR@10" not in seeds.paired([none], [none])
    with pytest.raises(LeadreError, match="other cases"):
        seeds.paired([cheap], [dear])


def test_pages_hold_the_tables_and_a_picture(tmp_path: Path) -> None:
    tables = [
        [row("leadre", 0.3), row("item-knn", 0.2)],
        [row("leadre", 0.4), row("item-knn", 0.2)],
    ]
    rows = seeds.methods(tables)
    sheet = quality.results_sheet(rows, "a < b")
    gaps = {"sft-only": {"HR@10": seeds.Paired(0.1, 0.2)}, "without-profile": {}}
    for picture in (quality.plot(rows), ablation.plot(gaps)):
        page.write_page(tmp_path / "x.html", "Title", "words", picture, [sheet], "about")
        text = (tmp_path / "x.html").read_text("utf-8")
        assert "<svg" in text
        assert "a &lt; b" in text
        assert "0.3500 ± 0.0707" in text


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["benchmarks.quality", "--json", "/nowhere/x.json"], "/nowhere/x.json"),
        (["benchmarks.quality", "--data", "/nowhere"], "/nowhere"),
        (["benchmarks.quality", "--seeds", "0"], "--seeds"),
        (["benchmarks.quality", "--source", "lake"], "--source"),
        (["benchmarks.ablation", "--only", "x"], "--only x"),
    ],
)
def test_bad_options_are_named(options: list[str], told: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *options],
        cwd=REPOSITORY,
        env={"PATH": "/usr/bin:/bin", "LEADRE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode in (1, 2)
    assert "error: " in done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr
