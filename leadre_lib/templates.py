"""Prompt templates: the words of a prompt in one language, `conf/prompts/<language>.yaml`.

This module owns how a prompt is built, so that what `prompts` writes `parse` reads back. Each part
is one line, in the order of `PARTS`; what is not known has no line. Each line begins with words of
its own, the behaviours are parted by a separator of `SEPARATORS`, and text from outside holds
neither line breaks nor separators (see `OUTSIDE`), so it can pass for nothing but itself.

Knows nothing of Spark, tokens or models.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

import yaml
from pydantic import AfterValidator, Field, ValidationError, model_validator

from leadre_lib.errors import LeadreError
from leadre_lib.settings import REPOSITORY, Section

FOLDER = REPOSITORY / "conf" / "prompts"
PARTS = ("role", "profile", "short_term", "long_term", "scene", "question", "answer")
MIN_PHRASE = 2  # characters; shorter ones stand in other texts too
PLACEHOLDER = re.compile(r"\{(\w*)\}")
LINE_BREAKS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
SEPARATORS = ";；"  # noqa: RUF001 (the Chinese semicolon)
# What text from outside must not hold, and what stands in its place, character by character.
OUTSIDE = "<>" + SEPARATORS + LINE_BREAKS
INSIDE = "(),，" + " " * len(LINE_BREAKS)  # noqa: RUF001 (the Chinese comma)

ProfileField = Literal["age", "gender", "residence", "education", "occupation"]
Event = Literal["click", "conversion", "play", "read", "like", "share", "search"]


class TemplateError(LeadreError):
    """A template is missing or malformed; the message names the file and the place."""


def _holds(*names: str, lines: int = 1) -> AfterValidator:
    """Text of some lines with each of the placeholders once."""

    def check(text: str) -> str:
        if sorted(PLACEHOLDER.findall(text)) != sorted(names):
            wanted = ", ".join(f"{{{name}}}" for name in names) or "no placeholder"
            raise ValueError(f"must hold {wanted}, each once")
        if any(brace in PLACEHOLDER.sub("", text) for brace in "{}"):
            raise ValueError("has a brace that belongs to no placeholder")
        if len(text.split("\n")) != lines or any(c in text for c in LINE_BREAKS[1:]):
            raise ValueError(f"must be text of {lines} line{'s' * (lines > 1)}")
        return text

    return AfterValidator(check)


Line = Annotated[str, Field(min_length=1), _holds()]


class ProfileTemplate(Section):
    """The profile sentence; `parts` in the order in which they stand."""

    sentence: Annotated[str, _holds("parts")]
    joiner: Line
    parts: dict[ProfileField, Annotated[str, _holds("value")]]


class ShortTermTemplate(Section):
    """The sentence of the latest behaviours. `when` is days ago, `what` a Semantic ID or title."""

    sentence: Annotated[str, _holds("behaviours")]
    joiner: Line
    behaviour: Annotated[str, _holds("when", "event", "what")]
    events: dict[Event, Line]


class LongTermTemplate(Section):
    """The sentence of the strongest categories."""

    sentence: Annotated[str, _holds("categories")]
    joiner: Line
    category: Annotated[str, _holds("category", "times")]


class AdTemplate(Section):
    """How an ad is named, and the prompts of the two tasks on names and Semantic IDs."""

    named: Annotated[str, _holds("title", "category")]
    text_to_sid: Annotated[str, _holds("ad", lines=2)]
    sid_to_text: Annotated[str, _holds("semantic_id", lines=2)]


class Template(Section):
    """The words of one language. `version` is kept with all that was made of them."""

    version: Annotated[str, Field(pattern=r"^[A-Za-z-]+-\d+$")]
    role: Line
    profile: ProfileTemplate
    short_term: ShortTermTemplate
    long_term: LongTermTemplate
    scene: Annotated[str, _holds("scene")]
    question: Line
    answer: Line
    intent_question: Line
    intent_answer: Line
    ad: AdTemplate

    @property
    def lines(self) -> dict[str, str]:
        """The line of each part, with its placeholder if it has one."""
        return {
            "role": self.role,
            "profile": self.profile.sentence,
            "short_term": self.short_term.sentence,
            "long_term": self.long_term.sentence,
            "scene": self.scene,
            "question": self.question,
            "answer": self.answer,
        }

    @property
    def phrases(self) -> list[str]:
        """The fixed texts of this language that are longer than a word's end, longest first.

        A tokenizer of our own has a token for each: most of a short prompt are these words, which
        say nothing that differs.
        """
        short, ad = self.short_term, self.ad
        behaviours = [short.behaviour.replace("{event}", name) for name in short.events.values()]
        asked = (f"{q}\n{a}" for q, a in zip(*self.asked.values(), strict=True))
        told = [self.profile.sentence, short.sentence, self.long_term.sentence, self.scene]
        pieces = [*told, *self.profile.parts.values(), *behaviours, ad.text_to_sid, ad.sid_to_text]
        fixed = {piece for text in pieces for piece in PLACEHOLDER.split(text)[::2]}
        long = {piece for piece in fixed if len(piece) > MIN_PHRASE}
        every = long | {f"{self.role}\n", short.joiner, *asked}
        return sorted(every, key=lambda piece: (-len(piece), piece))

    @property
    def asked(self) -> dict[str, tuple[str, str]]:
        """What the last two lines of a prompt may be: of the next ad, or of its category."""
        return {
            "question": (self.question, self.intent_question),
            "answer": (self.answer, self.intent_answer),
        }

    @functools.cached_property
    def patterns(self) -> dict[str, re.Pattern[str]]:
        """What a line of each part looks like; a placeholder is a group."""
        return {
            part: re.compile(
                "|".join(
                    "(.*)".join(map(re.escape, PLACEHOLDER.split(line)[::2]))
                    for line in self.asked.get(part, (line,))
                )
            )
            for part, line in self.lines.items()
        }

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        named: list[tuple[str, set[str], tuple[str, ...]]] = [
            ("profile.parts", set(self.profile.parts), get_args(ProfileField)),
            ("short_term.events", set(self.short_term.events), get_args(Event)),
        ]
        for place, found, wanted in named:
            if missing := [name for name in wanted if name not in found]:
                raise ValueError(f"{place}: {', '.join(missing)} is missing")
        return self

    @model_validator(mode="after")
    def _can_be_read_back(self) -> Self:
        """What `parse` relies on."""
        begins = {part: PLACEHOLDER.split(line)[0] for part, line in self.lines.items()}
        for part, words in begins.items():
            alike = [other for other in PARTS if other != part and begins[other].startswith(words)]
            if alike:
                raise ValueError(
                    f"{part}: must begin with words of its own, as {alike[0]} does too"
                )
        separator = self.short_term.joiner.strip()
        if separator not in tuple(SEPARATORS):
            raise ValueError(
                f"short_term.joiner: must be one of {' '.join(SEPARATORS)}, with or without spaces"
            )
        if any(
            separator in t for t in (self.short_term.behaviour, *self.short_term.events.values())
        ):
            raise ValueError(f"short_term: a behaviour must not hold the separator {separator}")
        return self


def read_template(path: Path) -> Template:
    """Read and validate one template file.

    Raises:
        TemplateError: the file is missing, or is not what a template must be; the message names the
            file and the place.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        template = Template.model_validate(values)
    except FileNotFoundError:
        raise TemplateError(f"{path}: no such template") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TemplateError(f"{path}: not valid YAML: {error}") from None
    except ValidationError as error:
        wrong = error.errors()[0]
        place = ".".join(str(part) for part in wrong["loc"] if part != "[key]")
        raise TemplateError(f"{path}: {place + ': ' if place else ''}{wrong['msg']}") from None
    if template.version.rpartition("-")[0] != path.stem:
        raise TemplateError(
            f"{path}: version {template.version!r} is of another language: name it {path.stem}-…"
        )
    return template


@functools.cache
def load_template(language: str) -> Template:
    """The template that `prompt.language` names.

    Raises:
        TemplateError: there is none, or it is malformed.
    """
    path = FOLDER / f"{language}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.yaml")))
        raise TemplateError(f"prompt.language {language!r}: no file {path} (there are: {known})")
    return read_template(path)


@functools.cache
def templates() -> tuple[Template, ...]:
    """All templates that there are."""
    return tuple(load_template(path.stem) for path in sorted(FOLDER.glob("*.yaml")))


@dataclass(frozen=True)
class Prompt:
    """A prompt and its lines, each with the part that it is."""

    template: Template
    parts: tuple[tuple[str, str], ...]

    @functools.cached_property
    def behaviours(self) -> list[str]:
        """The behaviours of the short-term sentence, oldest first; empty where there is none."""
        told = self.template.patterns["short_term"].fullmatch(
            dict(self.parts).get("short_term", "")
        )
        return told[1].split(self.template.short_term.joiner) if told else []

    def without(self, oldest: int) -> str:
        """The text without its `oldest` oldest behaviours; without all of them, no sentence."""
        kept = self.template.short_term.joiner.join(self.behaviours[oldest:])
        lines = dict(self.parts)
        if kept:
            lines["short_term"] = self.template.short_term.sentence.format(behaviours=kept)
        else:
            lines.pop("short_term", None)
        return "\n".join(lines.values())


def parse(text: str) -> Prompt | None:
    """The prompt that a text is by any of the templates; None for other texts, such as those of the
    tasks on names and Semantic IDs.
    """
    return next((found for t in templates() if (found := _parse(text, t))), None)


def _parse(text: str, template: Template) -> Prompt | None:
    parts: list[tuple[str, str]] = []
    left = list(PARTS)
    for line in text.split("\n"):
        part = next((part for part in left if template.patterns[part].fullmatch(line)), None)
        if part is None:
            return None
        parts.append((part, line))
        left = left[left.index(part) + 1 :]
    whole = not left and parts[0][0] == "role" and parts[-2][0] == "question"
    return Prompt(template, tuple(parts)) if whole else None
