"""The rules of a config that concern several of its sections."""

from owl_det.config import Config, ImageTextSource
from owl_det.config.checks import require


def check_between_sections(config: Config) -> None:
    """Raises `ConfigError`, naming the key to change, where sections contradict each other."""
    require(
        config.model.image.kind == "vit",
        "config.model.image.kind: a resnet is a teacher (config.distill.teacher); train a vit",
    )
    require(
        config.model.has_objectness_head or config.selection.instance_top_k == 0,
        "config.selection.instance_top_k: needs config.model.has_objectness_head",
    )
    for name, entry in config.data.train.items():
        require(
            not config.has_heads or not isinstance(entry, ImageTextSource),
            f"config.data.train.{name}: image-text pairs have no boxes, and nobody knows which "
            "names are absent; owl-det annotate makes pseudo_boxes of them",
        )
    if config.task == "contrastive":
        _check_contrastive(config)
    if config.task == "distill":
        _check_tower_distillation(config)
    if config.distill.active():
        _check_distillation(config)


def _check_contrastive(config: Config) -> None:
    """What contrastive pretraining asks of the other keys."""
    require(
        config.model.contrastive != "none",
        "config.model.contrastive: contrastive training needs softmax or sigmoid",
    )
    require(
        config.data.with_captions, "config.data.with_captions: contrastive training needs captions"
    )
    require(
        config.data.augment.mosaic_sizes == (1,) or config.model.vit.pooling == "mean",
        "config.data.augment.mosaic_sizes: only towers that pool by the mean can take the tiles of "
        f"a mosaic apart; {config.model.vit.pooling} pools whole images, (1,)",
    )
    require(
        config.optimizer.clip.scope in ("none", "global"),
        "config.optimizer.clip.scope: the contrastive loss couples the examples of a batch: none "
        f"or global, not {config.optimizer.clip.scope}",
    )
    require(
        config.selection.token_drop_rate == 0 or config.model.vit.pooling == "mean",
        "config.selection.token_drop_rate: in contrastive training only for towers that pool by "
        "the mean; set it to 0",
    )
    require(
        config.selection.instance_top_k == 0,
        "config.selection.instance_top_k: contrastive training has no boxes; set it to 0",
    )


def _check_tower_distillation(config: Config) -> None:
    """Towers have neither heads nor matching."""
    require(
        config.model.contrastive != "none",
        "config.model.contrastive: distillation of towers needs softmax or sigmoid",
    )
    require(
        bool(config.distill.active()),
        "config.distill: task distill needs a branch whose weight is not 0",
    )
    require(
        config.optimizer.clip.scope in ("none", "global"),
        "config.optimizer.clip.scope: distillation of towers clips none or global, not "
        f"{config.optimizer.clip.scope}",
    )
    require(
        config.selection.instance_top_k == 0,
        "config.selection.instance_top_k: towers have no objectness; set it to 0",
    )


def _check_distillation(config: Config) -> None:
    """What any distillation asks of the other sections; a branch's own `check` asks the rest."""
    distill, augment = config.distill, config.data.augment
    require(
        config.task != "contrastive",
        "config.distill: contrastive training has no branches; set config.task to distill",
    )
    require(
        not distill.shuffle_targets or config.batch_size > 1,
        "config.distill.shuffle_targets: a batch of one image has no other; raise batch_size",
    )
    require(
        not distill.cache
        or (augment.crop_probability == 0 and not augment.flip and augment.photometric == 0),
        "config.data.augment: config.distill.cache knows whole images as they are; set "
        "crop_probability and photometric to 0 and flip to False",
    )
