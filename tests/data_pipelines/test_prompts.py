"""Prompt templates: the lists themselves, and what is made of them."""

from collections import Counter

import numpy as np
import pytest

from data_pipelines import prompts
from owl_det.errors import ConfigError


def test_lists_are_complete():
    assert len(prompts.CLIP_TEMPLATES) == 81 and len(set(prompts.CLIP_TEMPLATES)) == 81
    assert prompts.CLIP_TEMPLATES[0] == "{}"
    assert len(set(prompts.CLIP_BEST_7)) == 7
    assert set(prompts.CLIP_BEST_7) < set(prompts.CLIP_TEMPLATES)


def test_every_template_has_one_slot_and_clip_form():
    for template in prompts.CLIP_TEMPLATES:
        assert template.count("{}") == 1
        assert template.replace("{}", "").count("{") == 0
        assert template == template.lower().strip()
    assert all(template.endswith(".") for template in prompts.CLIP_TEMPLATES[1:])


def test_articles_come_in_both_forms():
    definite = [t for t in prompts.CLIP_TEMPLATES if "the {}" in t and "hard to see" not in t]
    assert len(definite) >= 15
    assert sum(t.replace("the {}", "a {}") in prompts.CLIP_TEMPLATES for t in definite) >= 15


def test_names_are_lower_cased_and_may_hold_braces():
    template = "a photo of the large {}."
    assert prompts.apply_template(template, "Red Fox") == "a photo of the large red fox."
    assert prompts.apply_template("{}", "Set {A}") == "set {a}"


def test_modes():
    assert prompts.eval_prompts("none") == ("{}",)
    assert prompts.eval_prompts("clip_best7") == prompts.CLIP_BEST_7
    assert prompts.eval_prompts("clip") == prompts.CLIP_TEMPLATES
    with pytest.raises(ConfigError, match="'clip7' is not one of 'none', 'clip', 'clip_best7'"):
        prompts.eval_prompts("clip7")
    with pytest.raises(ConfigError, match="'' is not one of"):
        prompts.train_prompt("dog", "", np.random.default_rng(0))


def test_training_prompts_cover_the_list_evenly_and_follow_the_seed():
    rng = np.random.default_rng(0)
    drawn = Counter(prompts.train_prompt("Dog", "clip", rng) for _ in range(81 * 40))
    assert set(drawn) == {t.replace("{}", "dog") for t in prompts.CLIP_TEMPLATES}
    assert min(drawn.values()) > 15 and max(drawn.values()) < 80
    again = [prompts.train_prompt("Dog", "clip", np.random.default_rng(3)) for _ in range(2)]
    assert again[0] == again[1]
    assert prompts.train_prompt("Dog", "none", rng) == "dog"
