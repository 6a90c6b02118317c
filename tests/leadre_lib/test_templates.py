"""Prompt templates: those that there are, bad files, and that what is written can be read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from leadre_lib.interests import INTEREST_EVENTS
from leadre_lib.model import build_tokenizer, sid_tokens
from leadre_lib.templates import (
    FOLDER,
    INSIDE,
    LINE_BREAKS,
    OUTSIDE,
    TemplateError,
    load_template,
    parse,
    read_template,
    templates,
)

ENGLISH = (
    "You are an ad recommendation system.\n"
    "The user: 34 years old, lives in Lyon.\n"
    "Recent behaviours: 3*play*My first marathon.; 1*click*<a_0><b_0>.\n"
    "Long-term interests: sports*2.\n"
    "Scene: feed.\n"
    "What ad will the user be interested in next?\nAnswer: "
)
CHINESE = (
    "你是一个广告推荐系统。\n"
    "最近行为：3*播放*我的第一次马拉松。；1*点击*<a_0><b_0>。\n"
    "用户接下来会对什么广告感兴趣？\n答案："
)


def test_all_templates_can_be_read_and_know_every_behaviour() -> None:
    found = {template.version.rpartition("-")[0]: template for template in templates()}
    assert {"en", "zh"} <= set(found)
    for language, template in found.items():
        assert template == load_template(language)
        assert set(template.short_term.events) == set(INTEREST_EVENTS)


def test_a_prompt_can_be_read_back() -> None:
    told = parse(ENGLISH)
    assert told is not None
    assert "\n".join(line for _, line in told.parts) == ENGLISH
    assert told.behaviours == ["3*play*My first marathon.", "1*click*<a_0><b_0>"]
    assert told.without(0) == ENGLISH
    assert told.without(1) == ENGLISH.replace("3*play*My first marathon.; ", "")
    assert told.without(2) == "\n".join(
        line for line in ENGLISH.split("\n") if not line.startswith("Recent")
    )
    chinese = parse(CHINESE)
    assert chinese is not None
    assert chinese.template.version == "zh-1"
    assert chinese.behaviours == ["3*播放*我的第一次马拉松。", "1*点击*<a_0><b_0>"]
    assert parse(told.without(2)).behaviours == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Ad: Trail running shoes (sports)\nSemantic ID: ",
        "Semantic ID: <a_0><b_0>\nAd: ",
        ENGLISH.removesuffix("\nAnswer: "),
        ENGLISH.replace("Long-term", "Short-term"),
        ENGLISH.replace("You are an ad", "You are a"),
        ENGLISH.replace("?\nAnswer: ", "?\nAnswer: \nAnswer: "),
        "\n".join(ENGLISH.split("\n")[::-1]),
        ENGLISH.replace("Recent behaviours: ", "最近行为："),
    ],
)
def test_other_texts_are_no_prompts(text: str) -> None:
    assert parse(text) is None


def test_outside_text_is_made_harmless_character_by_character() -> None:
    assert len(OUTSIDE) == len(INSIDE) == len(set(OUTSIDE))
    assert not set(OUTSIDE) & set(INSIDE)
    assert all(len(f"a{char}b".splitlines()) == 2 for char in LINE_BREAKS)
    for template in templates():
        assert set(template.short_term.joiner) & set(OUTSIDE)


def change(values: dict[str, Any], place: str, value: Any) -> None:
    """Set what `a.b.c` names; None takes it away."""
    *path, last = place.split(".")
    for key in path:
        values = values[key]
    if value is None:
        del values[last]
    else:
        values[last] = value


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        ("rôle", "You are", "rôle: Extra inputs"),
        ("profile.parts.salary", "{value}", "profile.parts.salary"),
        ("short_term.events.hover", "hover", "short_term.events.hover"),
        ("question", None, "question: Field required"),
        ("profile.parts.age", None, "profile.parts: age is missing"),
        ("short_term.events.share", None, "short_term.events: share is missing"),
        ("profile.sentence", "The user.", "profile.sentence: .* must hold {parts}"),
        ("scene", "Scene: {scene} {scene}.", "scene: .* must hold {scene}, each once"),
        ("long_term.category", "{category}*{count}", "long_term.category: .* must hold {category}"),
        ("role", "You are {name}.", "role: .* must hold no placeholder"),
        ("ad.named", "{title} ({category}) }", "ad.named: .* brace"),
        ("question", "What\nnext?", "question: .* 1 line"),
        ("answer", "", "answer: "),
        ("ad.text_to_sid", "Ad: {ad}", "ad.text_to_sid: .* 2 lines"),
        ("scene", "{scene}", "scene: must begin with words of its own"),
        ("scene", "The user: of {scene}.", "profile: must begin with words of its own, as scene"),
        ("short_term.joiner", ", ", "short_term.joiner: must be one of"),
        ("short_term.events.play", "play;", "must not hold the separator"),
        ("version", "1", "version: "),
        ("version", "zh-1", "of another language"),
        ("age", 3, "age: Extra inputs"),
        ("role", 3, "role: Input should be a valid string"),
    ],
)
def test_a_bad_file_is_named_with_the_place(
    tmp_path: Path, place: str, value: Any, told: str
) -> None:
    values = yaml.safe_load((FOLDER / "en.yaml").read_text("utf-8"))
    path = tmp_path / "en.yaml"
    path.write_text(yaml.safe_dump(values, allow_unicode=True, sort_keys=False), "utf-8")
    assert read_template(path) == load_template("en")
    change(values, place, value)
    path.write_text(yaml.safe_dump(values, allow_unicode=True, sort_keys=False), "utf-8")
    with pytest.raises(TemplateError, match=told) as error:
        read_template(path)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize("content", [b"", b"- a\n", b"role: [", b"role: \xff\n"])
def test_what_is_no_mapping_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "en.yaml"
    path.write_bytes(content)
    with pytest.raises(TemplateError, match=str(path)):
        read_template(path)


def test_an_unknown_language_is_told_which_there_are(tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match=r"'tlh': no file .*tlh\.yaml \(there are: en, zh\)"):
        load_template("tlh")
    with pytest.raises(TemplateError, match="no such template"):
        read_template(tmp_path / "en.yaml")


def test_fixed_words_are_single_tokens_and_everything_decodes_back() -> None:
    template = load_template("en")
    plain, own = (
        build_tokenizer([ENGLISH], sid_tokens((1, 1)), 400, phrases)
        for phrases in ((), template.phrases)
    )
    for text in (ENGLISH, "Ad: Cola; zero (drinks)\nSemantic ID: ", "; 1*play*", "What ad?"):
        assert own.decode(own(text)["input_ids"]) == text
    tokens = own.tokenize(ENGLISH)
    asked = f"{template.question}\n{template.answer}"
    for phrase in (f"{template.role}\n", "Recent behaviours: ", "*click*", "; ", asked):
        assert phrase in tokens
    assert len(tokens) < len(plain.tokenize(ENGLISH)) - 20
    assert own.tokenize("1*click*<a_0><b_0>") == ["1", "*click*", "<a_0>", "<b_0>"]
    assert load_template("zh").phrases != template.phrases
