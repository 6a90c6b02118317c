"""Typed settings: a profile file, a source file over it, environment variables over both.

Order of precedence, highest first: `LEADRE_*` environment variables (`LEADRE_SFT__EPOCHS=2` sets
`sft.epochs`), arguments of `load_settings`, `conf/sources/<source>.yaml`, `conf/<profile>.yaml`,
the defaults below. An unknown name or a bad value stops the program and is named.

Knows nothing of Spark, of models, or of what the settings are used for.
"""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings import SettingsError as SourceError

from leadre_lib.errors import LeadreError

REPOSITORY = Path(__file__).resolve().parent.parent
ENV_PREFIX = "LEADRE_"
Fraction = float


class SettingsError(LeadreError):
    """A setting is unknown, malformed or missing; the message names it and the mend."""


class Section(BaseModel):
    """One named group of settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SimulatorSettings(Section):
    """The built-in ad world. Sizes are totals; rates are per user and day."""

    users: PositiveInt = 2000
    ads: PositiveInt = 1000
    new_ads_per_day: int = Field(20, ge=0)
    first_ds: dt.date = dt.date(2026, 3, 2)
    history_days: PositiveInt = 5
    content_events_per_day: float = Field(3.0, ge=0)
    impressions_per_day: float = Field(6.0, ge=0)


class MovieLensSettings(Section):
    """MovieLens-100K: where it is fetched from and what is held out."""

    recbole_version: str = "1.2.1"
    sha256: str = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
    eval_last: PositiveInt = 1


class QualitySettings(Section):
    """Limits of the data-quality gates."""

    max_unknown_reference_rate: Fraction = Field(0.02, ge=0, le=1)
    max_duplicate_event_rate: Fraction = Field(0.05, ge=0, le=1)
    min_candidate_coverage: Fraction = Field(0.95, ge=0, le=1)
    max_collision_rate: Fraction = Field(0.2, ge=0, le=1)
    volume_ratio: float = Field(3.0, gt=1)
    max_score_drift: float = Field(2.0, gt=0, description="nats, of the mean candidate score")


class InterestSettings(Section):
    """The window that a prompt looks back over."""

    window_days: PositiveInt = 90
    half_life_days: float = Field(14.0, gt=0)
    long_term_categories: PositiveInt = 4
    short_term_behaviours: PositiveInt = 8
    max_behaviours: PositiveInt = 200


class FusionSettings(Section):
    """The whole retrieval: the model's list, fused with what else is known (see `fusion`)."""

    enabled: bool = Field(True, description="false: the model's list is the retrieval")
    decay: float = Field(0.5, gt=0, lt=1, description="of a step further back in a history")
    steps: PositiveInt = Field(10, description="of a history that count, and between two objects")
    near: PositiveInt = Field(200, description="objects that each signal brings into a list")
    words: int = Field(256, ge=0, description="dimensions of the words' vectors; 0: none")
    half_life_days: float = Field(
        2.0, gt=0, description="a user who took an object so long ago is half a taker of it"
    )


class PromptSettings(Section):
    """The intent-aware prompt (paper, section 3.1): its words, and which of its parts it has."""

    language: str = Field(
        "en", pattern=r"^[A-Za-z-]+$", description="names a template in conf/prompts"
    )
    profile: bool = True
    long_term: bool = True
    short_term: bool = True
    content: bool = Field(True, description="content beside ads, in both interests")
    scene_fraction: Fraction = Field(
        0.5, ge=0, le=1, description="of the training targets with a known scene, that name it"
    )


class TaskWeights(Section):
    """What an example of each task weighs in the loss; 0: there are none of it."""

    next_ad: float = Field(2.0, ge=0)
    titles_to_sid: float = Field(1.0, ge=0)
    next_category: float = Field(0.25, ge=0)
    text_to_sid: float = Field(1.0, ge=0)
    sid_to_text: float = Field(1.0, ge=0)
    synthetic_next_ad: float = Field(
        1.0, ge=0, description="of a synthetic history: its draws of what comes next together"
    )


class ExampleSettings(Section):
    """How many training and evaluation examples are drawn, and what they weigh."""

    task_weights: TaskWeights = TaskWeights()
    targets_per_user: PositiveInt = 10
    targets_apart: PositiveInt = Field(
        1, description="every so many of a user's targets are taken; prompts of neighbours overlap"
    )
    max_next_ad_examples: PositiveInt = 6000
    click_weight: float = Field(0.5, ge=0, description="of a click, where a conversion weighs 1")
    value_power: float = Field(
        0.25, ge=0, le=1, description="of a target's eCPM over the mean, in its weight; 0: none"
    )
    min_behaviours: int = Field(1, ge=0)
    titles_to_sid_fraction: Fraction = Field(0.05, ge=0, le=1)
    text_fraction: Fraction = Field(
        0.25, ge=0, le=1, description="of the ads, whose names and Semantic IDs are asked for"
    )
    synthetic_per_ad: int = Field(
        40, ge=0, description="synthetic histories an active marketing object; 0: none"
    )
    synthetic_steps: PositiveInt = Field(8, description="of a synthetic history at most")
    synthetic_neighbours: PositiveInt = Field(
        30, description="objects that each signal brings in, at each step"
    )
    synthetic_draws: PositiveInt = Field(8, description="of what comes next, of each history")
    max_synthetic_histories: PositiveInt = 20000
    pairs_from: Literal["interactions", "impressions"] = Field(
        "interactions", description="ads clicked or converted on make pairs, or those shown too"
    )
    pairs_per_user: int = Field(3, ge=0, description="of each origin")
    min_ecpm_ratio: float = Field(1.1, ge=1)
    max_preference_pairs: PositiveInt = Field(1500, description="of each origin")
    valid_fraction: Fraction = Field(0.3, gt=0, lt=1)
    max_valid_cases: PositiveInt = 5000
    max_test_cases: PositiveInt = 10000
    eval_targets: Literal["happened", "arrived"] = Field(
        "happened", description="conversions that happened on ds, or all that arrived with it"
    )
    cutoff: Literal["day", "event"] = Field(
        "day", description="a target's prompt knows what is older than its day, or than itself"
    )
    split_by: Literal["hash", "prefix"] = Field(
        "hash", description="users drawn by hash, or user ids that begin with valid- or test-"
    )


class EmbeddingSettings(Section):
    """The text encoder: `bundled` (all-MiniLM-L6-v2), a local path or a hub id."""

    model: str = "bundled"
    batch_size: PositiveInt = 64
    max_tokens: PositiveInt = 64


Method = Literal["rq-vae", "rq-kmeans", "rq-kmeans-balanced", "rq-kmeans+"]
METHODS: tuple[Method, ...] = get_args(Method)


class SemanticIdSettings(Section):
    """The residual quantiser (paper, section 3.2; see `quantisers`), and when it is refreshed.

    `collision_codes`: how many last tokens there are. `alternatives`: among how many codes of the
    last level an object looks for a free one before it shares its codes with another (1: none).
    """

    method: Method = "rq-kmeans-balanced"
    levels: int = Field(0, ge=0, le=25, description="0: as many as the catalogue needs")
    codes: int = Field(0, ge=0, description="of a level; 0: as many as the catalogue needs")
    collision_codes: PositiveInt = 64
    alternatives: PositiveInt = 16
    latent_dim: PositiveInt = 32
    hidden_dim: PositiveInt = 256
    epochs: PositiveInt = 100
    max_vectors: PositiveInt = Field(
        1_000_000, description="that training sees in all its epochs; a large catalogue has fewer"
    )
    batch_size: PositiveInt = 256
    learning_rate: float = Field(1e-3, gt=0)
    commitment: float = Field(0.05, ge=0)
    refresh_error: float = Field(
        1.25,
        gt=1,
        description="reconstruction error, against that when it came into use, which is drift",
    )
    refresh_collision_rate: Fraction = Field(
        0.05, ge=0, le=1, description="collisions before the last token which are drift"
    )
    max_moved: Fraction = Field(
        0.05, ge=0, le=1, description="unchanged objects whose codes a refresh may change"
    )


class ModelSettings(Section):
    """The decoder. `base` empty: a Qwen2 of these sizes, from scratch; else a path or hub id."""

    base: str = ""
    hidden_size: PositiveInt = 128
    intermediate_size: PositiveInt = 384
    layers: PositiveInt = 3
    heads: PositiveInt = 4
    kv_heads: PositiveInt = 2
    vocabulary: PositiveInt = 2048
    max_tokens: PositiveInt = 384
    initializer_range: float = Field(0.04, gt=0, description="of weights that start at random")


class TrainingSettings(Section):
    """What SFT and DPO share. Batch sizes are those of a rank and optimizer step: rows, each packed
    with examples, of SFT, and pairs of DPO.

    `ranks` counts those of all hosts; `deepspeed` names a file in `conf`; `hostfile` is a DeepSpeed
    hostfile, `host slots=8` a line, or empty: this machine alone.
    """

    ranks: PositiveInt = 2
    deepspeed: str = "deepspeed_cpu.json"
    hostfile: str = ""
    master_port: int = Field(0, ge=0, le=65535, description="of the first host; 0: a free one")
    learning_rate: float = Field(3e-3, gt=0)
    batch_size: PositiveInt = 8
    epochs: float = Field(1.5, gt=0)
    max_steps: int = Field(0, ge=0, description="0: as many as the epochs need")
    warmup_ratio: Fraction = Field(0.05, ge=0, le=1)
    weight_decay: float = Field(0.1, ge=0)
    adam_beta2: float = Field(0.98, gt=0, lt=1)
    checkpoint_steps: PositiveInt = 50
    gradient_checkpointing: bool = False
    lora_rank: int = Field(
        0,
        ge=0,
        description="of adapters on all linear layers, trained together with the embeddings of"
        " Semantic ID tokens alone; 0: all weights are trained",
    )
    lora_alpha: PositiveInt = Field(32, description="over the rank: what adapters are scaled by")


class SftSettings(TrainingSettings):
    """Supervised fine-tuning (paper, section 3.3), in packed rows (see `packing`)."""

    batch_size: PositiveInt = 4
    row_tokens: int = Field(0, ge=0, description="of a packed row; 0: model.max_tokens")
    loss_on: Literal["response", "semantic_ids"] = Field(
        "semantic_ids",
        description="the response alone, or every Semantic ID of the prompt too: a behaviour is"
        " then a target of what is older than it",
    )
    validations: PositiveInt = Field(10, description="how often validation cases are decoded")
    validation_cases: int = Field(500, ge=0, description="of them; 0: the last weights are kept")
    patience: PositiveInt = Field(
        5, description="validations after the one that is kept that end it"
    )


Origin = Literal["value", "dismissal", "beam"]


class DpoSettings(TrainingSettings):
    """Direct Preference Optimization with the SFT loss mixed in (paper, section 3.3).

    `origins` names the pairs to train on (see `preferences`); those of `beam` come from what the
    SFT model lists for `beam_prompts` prompts of `sft_examples`.
    """

    learning_rate: float = Field(1e-4, gt=0)
    batch_size: PositiveInt = 16
    epochs: float = Field(1.0, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    beta: float = Field(0.3, gt=0)
    sft_weight: float = Field(1.0, ge=0)
    loss: Literal["pairwise", "listwise"] = Field(
        "listwise", description="listwise: one chosen against all that were rejected for it"
    )
    max_rejected: PositiveInt = Field(4, description="of a list")
    weight_by_gap: bool = Field(False, description="pairs weigh the log ratio of their eCPMs")
    origins: tuple[Origin, ...] = Field(("value", "dismissal"), min_length=1)
    beam_prompts: PositiveInt = 400
    beam_top: PositiveInt = Field(10, description="objects of a list among which pairs are made")
    max_score_gap: float = Field(
        1.0, ge=0, description="nats, between two objects of a pair that the user did not want"
    )


class DecodingSettings(Section):
    """Constrained beam search.

    `beam` prefixes are kept after every level, or `level_beams` of them, one width for each token
    of a Semantic ID but the last. `top_k` counts marketing objects.
    """

    beam: PositiveInt = 32
    level_beams: tuple[PositiveInt, ...] = ()
    top_k: PositiveInt = 20
    batch_tokens: PositiveInt = Field(8192, description="of prompts and beams read at a time")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 on accelerators, float32 on CPUs"
    )
    normalise: Literal["vocabulary", "level"] = Field(
        "vocabulary", description="log-probabilities among all tokens, or among a level's codes"
    )
    share_prefix: bool = Field(True, description="read what all prompts begin with once")
    group_by: Literal["", "category", "advertiser_id"] = Field(
        "", description="column of the ads of which a user gets at most max_per_group objects"
    )
    max_per_group: PositiveInt = 5
    backend: Literal["leadre", "vllm"] = Field("leadre", description="what bulk inference runs on")


class EvaluationSettings(Section):
    """Promotion rules and ranking rules. `exclude_seen` holds for all methods alike."""

    tolerance: Fraction = Field(0.02, ge=0, description="absolute HR@10 a challenger may lose")
    min_value_gain: Fraction = Field(
        0.05, ge=0, description="eCPM-weighted HR@10 that DPO has to gain, a part of that of SFT"
    )
    max_hit_loss: Fraction = Field(
        0.01, ge=0, le=1, description="HR@10 that DPO may lose, a part of that of SFT"
    )
    exclude_seen: bool = False


class SasrecSettings(Section):
    """The baseline SASRec. What it costs grows with interactions times marketing objects."""

    epochs: int = Field(40, ge=0, description="at most; 0 leaves the baseline out")
    patience: PositiveInt = Field(8, description="epochs without a better one before it stops")
    held_out: int = Field(
        500, ge=0, description="users, no more than half, whose last interactions choose the epoch"
    )
    window: PositiveInt = Field(50, description="latest items of a history that are read")
    dim: PositiveInt = 64
    heads: PositiveInt = 1
    blocks: PositiveInt = 2
    dropout: Fraction = Field(0.5, ge=0, lt=1)
    batch_size: PositiveInt = Field(64, description="windows")
    learning_rate: float = Field(3e-3, gt=0)
    weight_decay: float = Field(0.1, ge=0)


class InferenceSettings(Section):
    """Bulk inference."""

    shards: PositiveInt = 2
    threads: PositiveInt = Field(1, description="of one shard; shards times threads: the cores")
    active_days: PositiveInt = 30
    users_per_part: PositiveInt = Field(1024, description="of whom a kill loses the work at most")
    fill: bool = Field(True, description="up to top_k objects from neighbours and popularity")
    incremental: bool = Field(
        False, description="carry over the candidates of users whose prompt says what it said"
    )
    max_age_days: PositiveInt = Field(7, description="after which they are decoded all the same")


class SparkSettings(Section):
    """Where Apache Spark runs (`engine: spark`)."""

    master: str = "local[2]"
    driver_memory: str = "2g"
    shuffle_partitions: PositiveInt = 4


class ChainSettings(Section):
    """How the DAGs run."""

    raw_deadline_hours: float = Field(12.0, gt=0)
    retries: int = Field(2, ge=0)
    retry_delay_seconds: int = Field(5, ge=0)
    task_timeout_minutes: PositiveInt = 120
    schedule: bool = Field(True, description="false: runs only when asked for, as by `make run`")


class Settings(BaseSettings):
    """All settings of one run. Build it with `load_settings`."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True
    )

    profile: str = "local"
    home: Path = Path(".leadre")
    source: Literal["simulator", "movielens", "amazon", "lake"] = "simulator"
    engine: Literal["sail", "spark"] = "sail"
    data: Path | None = None
    seed: int = Field(20260302, ge=0)

    simulator: SimulatorSettings = SimulatorSettings()
    movielens: MovieLensSettings = MovieLensSettings()
    quality: QualitySettings = QualitySettings()
    interests: InterestSettings = InterestSettings()
    fusion: FusionSettings = FusionSettings()
    prompt: PromptSettings = PromptSettings()
    examples: ExampleSettings = ExampleSettings()
    embedding: EmbeddingSettings = EmbeddingSettings()
    semantic_ids: SemanticIdSettings = SemanticIdSettings()
    model: ModelSettings = ModelSettings()
    sft: SftSettings = SftSettings()
    dpo: DpoSettings = DpoSettings()
    decoding: DecodingSettings = DecodingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    sasrec: SasrecSettings = SasrecSettings()
    inference: InferenceSettings = InferenceSettings()
    spark: SparkSettings = SparkSettings()
    chain: ChainSettings = ChainSettings()

    @field_validator("home", "data")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        try:
            return None if value is None else (REPOSITORY / value.expanduser()).resolve()
        except RuntimeError as error:  # the home of a user that does not exist
            raise ValueError(str(error)) from None

    @property
    def state(self) -> Path:
        """The folder of this source's state, apart from every other source's."""
        return self.home / self.source

    @property
    def lake(self) -> Path:
        """Root folder of the Delta tables."""
        return self.state / "lake"

    @property
    def releases(self) -> Path:
        """Folder of the immutable releases and the champion pointer."""
        return self.state / "releases"

    @property
    def codebooks(self) -> Path:
        """Folder of the trained codebooks."""
        return self.state / "codebooks"

    @property
    def online_store(self) -> Path:
        """The SQLite file that serves the published candidates."""
        return self.state / "online.sqlite"

    @property
    def data_docs(self) -> Path:
        """Folder of the Data Docs site of the data-quality results."""
        return self.state / "data_docs"

    @property
    def cache(self) -> Path:
        """Folder for downloads and embeddings; may be deleted at any time."""
        return self.home / "cache"

    def work(self, ds: dt.date) -> Path:
        """Private scratch folder of the jobs of one day; may be deleted between runs."""
        return self.state / "work" / ds.isoformat()

    def reports(self, ds: dt.date) -> Path:
        """Folder of one day's report."""
        return self.state / "reports" / ds.isoformat()

    def with_fusion_of(self, told: Mapping[str, Any] | None) -> Settings:
        """These settings, with those of the fusion that some factors were fitted with: they mean
        nothing under others. `enabled` stays; None: all stay.
        """
        kept = {name: value for name, value in (told or {}).items() if name != "enabled"}
        return self.model_copy(update={"fusion": self.fusion.model_copy(update=kept)})

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Environment variables go over the files, which `load_settings` hands in."""
        return env_settings, init_settings


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise SettingsError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise SettingsError(f"{path}: expected a mapping of settings")
    return values


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both_maps = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both_maps else value
    return merged


def _check_environment() -> None:
    """pydantic-settings passes over a misspelt variable in silence; a user should hear of it."""
    for name in os.environ:
        if not name.startswith(ENV_PREFIX):
            continue
        kind: Any = Settings
        for part in name.removeprefix(ENV_PREFIX).lower().split("__"):
            is_section = isinstance(kind, type) and issubclass(kind, BaseModel)
            known = is_section and part in kind.model_fields
            if not known:
                break
            kind = kind.model_fields[part].annotation
        if not known:
            raise SettingsError(f"unknown environment variable {name}: see leadre_lib/settings.py")


def load_settings(**overrides: Any) -> Settings:
    """Read profile, source file and environment into `Settings`.

    Raises:
        SettingsError: a file, name or value is wrong; the message names it.
    """
    _check_environment()
    conf = REPOSITORY / "conf"
    profile = overrides.get("profile") or os.environ.get(f"{ENV_PREFIX}PROFILE", "local")
    path = conf / f"{profile}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in conf.glob("*.yaml")))
        raise SettingsError(f"profile {profile!r}: no file {path} (known profiles: {known})")
    values = _read_yaml(path)
    source = (
        overrides.get("source")
        or os.environ.get(f"{ENV_PREFIX}SOURCE")
        or values.get("source", "simulator")
    )
    source_path = conf / "sources" / f"{source}.yaml"
    if source_path.is_file():
        values = _merge(values, _read_yaml(source_path))
    try:
        return Settings(**_merge(values, {**overrides, "profile": profile}))
    except SourceError as error:
        raise SettingsError(
            f"bad environment variable: {error}; see leadre_lib/settings.py"
        ) from None
    except ValidationError as error:
        lines = [
            f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}"
            f" (got {item.get('input')!r})"
            for item in error.errors()
        ]
        raise SettingsError("bad settings:\n  " + "\n  ".join(lines)) from None
