"""What a config's branches declare of a teacher's cache: signals, and what they depend on."""

import dataclasses
from typing import Any

from data_pipelines.teacher_cache import CacheRequest
from owl_det.config import Config
from owl_det.distillation import branches


def cache_request(config: Config) -> CacheRequest | None:
    """What training reads of the cache; None where no branch is active or no cache is named."""
    if not (config.distill.cache and config.distill.active()):
        return None
    return CacheRequest(signals=branches.needs(config.distill), settings=cached_settings(config))


def cached_settings(config: Config) -> dict[str, Any]:
    """What a teacher's outputs depend on beside its parameters; a cache's manifest holds the same.

    Objects are cropped, and names worded, as the branch says that declares it.
    """
    distill = config.distill
    regions = dataclasses.asdict(distill.regions)
    del regions["max_regions"]
    cropping = branches.providing(distill, "crop_scale")
    assert cropping is not None
    branch, entry = cropping
    assert branch.crop_scale is not None
    return {
        "image_size": config.model.image_size,
        "preprocess": dataclasses.asdict(config.preprocess),
        "regions": regions,
        "instance_crop_scale": branch.crop_scale(entry),
        "dense_image_size": distill.dense_image_size or config.model.image_size,
        "dense_last_block": distill.dense_last_block,
        "names": branches.name_texts(distill),
    }
