"""Prompt templates around category names: `a photo of a {}.`

The lists are CLIP's for ImageNet (openai/CLIP, notebooks/Prompt_Engineering_for_ImageNet.ipynb).
OWL-ViT trains with one of them drawn at random for each name, the bare name among them, and
averages the probabilities of the seven best at test time (arXiv 2205.06230, A1.3).
"""

import numpy as np

from owl_det.errors import ConfigError

BARE = "{}"

CLIP_BEST_7 = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)

# The 80 of CLIP after the bare name, which the authors' code adds for training.
CLIP_TEMPLATES = (
    BARE,
    "a bad photo of a {}.",
    "a photo of many {}.",
    "a sculpture of a {}.",
    "a photo of the hard to see {}.",
    "a low resolution photo of the {}.",
    "a rendering of a {}.",
    "graffiti of a {}.",
    "a bad photo of the {}.",
    "a cropped photo of the {}.",
    "a tattoo of a {}.",
    "the embroidered {}.",
    "a photo of a hard to see {}.",
    "a bright photo of a {}.",
    "a photo of a clean {}.",
    "a photo of a dirty {}.",
    "a dark photo of the {}.",
    "a drawing of a {}.",
    "a photo of my {}.",
    "the plastic {}.",
    "a photo of the cool {}.",
    "a close-up photo of a {}.",
    "a black and white photo of the {}.",
    "a painting of the {}.",
    "a painting of a {}.",
    "a pixelated photo of the {}.",
    "a sculpture of the {}.",
    "a bright photo of the {}.",
    "a cropped photo of a {}.",
    "a plastic {}.",
    "a photo of the dirty {}.",
    "a jpeg corrupted photo of a {}.",
    "a blurry photo of the {}.",
    "a photo of the {}.",
    "a good photo of the {}.",
    "a rendering of the {}.",
    "a {} in a video game.",
    "a photo of one {}.",
    "a doodle of a {}.",
    "a close-up photo of the {}.",
    "a photo of a {}.",
    "the origami {}.",
    "the {} in a video game.",
    "a sketch of a {}.",
    "a doodle of the {}.",
    "a origami {}.",
    "a low resolution photo of a {}.",
    "the toy {}.",
    "a rendition of the {}.",
    "a photo of the clean {}.",
    "a photo of a large {}.",
    "a rendition of a {}.",
    "a photo of a nice {}.",
    "a photo of a weird {}.",
    "a blurry photo of a {}.",
    "a cartoon {}.",
    "art of a {}.",
    "a sketch of the {}.",
    "a embroidered {}.",
    "a pixelated photo of a {}.",
    "itap of the {}.",
    "a jpeg corrupted photo of the {}.",
    "a good photo of a {}.",
    "a plushie {}.",
    "a photo of the nice {}.",
    "a photo of the small {}.",
    "a photo of the weird {}.",
    "the cartoon {}.",
    "art of the {}.",
    "a drawing of the {}.",
    "a photo of the large {}.",
    "a black and white photo of a {}.",
    "the plushie {}.",
    "a dark photo of a {}.",
    "itap of a {}.",
    "graffiti of the {}.",
    "a toy {}.",
    "itap of my {}.",
    "a photo of a cool {}.",
    "a photo of a small {}.",
    "a tattoo of the {}.",
)

_TEMPLATES = {"none": (BARE,), "clip": CLIP_TEMPLATES, "clip_best7": CLIP_BEST_7}


def apply_template(template: str, name: str) -> str:
    """Puts the lower-cased name into the template's slot `{}`."""
    # Not str.format: a name may hold braces itself.
    return template.replace(BARE, name.lower())


def train_prompt(name: str, mode: str, rng: np.random.Generator) -> str:
    """The name in one of the mode's templates, each equally likely.

    `mode` is "none" (the bare name), "clip" or "clip_best7"; any other raises `ConfigError`.
    """
    templates = eval_prompts(mode)
    return apply_template(templates[rng.integers(len(templates))], name)


def eval_prompts(mode: str) -> tuple[str, ...]:
    """The templates whose scores are averaged at evaluation: "none", "clip" or "clip_best7".

    Raises `ConfigError` for any other mode.
    """
    if mode not in _TEMPLATES:
        known = ", ".join(map(repr, _TEMPLATES))
        raise ConfigError(f"config.data prompts: {mode!r} is not one of {known}")
    return _TEMPLATES[mode]
