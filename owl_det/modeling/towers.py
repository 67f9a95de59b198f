"""Which parameters are the towers', and which of those contrastive training alone uses."""

from owl_det.types import Params

# The parameters of a contrastive model; a checkpoint of kind "towers" has these alone.
TOWERS = ("image", "text", "logit_scale", "logit_bias")
# Those of them that only contrastive training uses; a detector may lack them.
CONTRASTIVE = ("logit_scale", "logit_bias", "image/map_head", "image/visual_projection")


def without_contrastive(params: Params) -> tuple[Params, list[str]]:
    """The parameters without those of `CONTRASTIVE`, and the names of what was there."""
    kept = {**params, "image": dict(params["image"])}
    found = []
    for name in CONTRASTIVE:
        *parents, leaf = name.split("/")
        if (kept[parents[0]] if parents else kept).pop(leaf, None) is not None:
            found.append(name)
    return kept, found
