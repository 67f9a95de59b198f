"""Average precision by category, group and size, and its means."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from data_pipelines.features import Category

SIZES = ("small", "medium", "large")


@dataclass(frozen=True, kw_only=True)
class GroupMetrics:
    """Means over the categories of a group that have ground truth."""

    AP: float
    AP50: float
    precision: Float[np.ndarray, " r"]  # at IoU 0.5, for `Metrics.recall`


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Results in [0, 1]. Groups, sizes and categories without ground truth are left out."""

    AP: float  # mean over the IoU thresholds 0.50, 0.55 … 0.95
    AP50: float
    AP75: float
    AP_by_size: dict[str, float]  # of SIZES: areas to 32², to 96², beyond (pixels)
    groups: dict[str, GroupMetrics]
    AP_by_category: dict[str, float]
    AP50_by_category: dict[str, float]
    instances_by_category: dict[str, int]  # crowd regions are none
    recall: Float[np.ndarray, " r"]
    precision: Float[np.ndarray, " r"]  # mean over categories at IoU 0.5, for `recall`
    num_images: int
    num_instances: int  # crowd regions are none

    def scalars(self) -> dict[str, float]:
        """The numbers to log: `AP, AP50, AP75`, `AP_<size>`, `AP_<group>`, `AP50_<group>`, counts.

        LVIS's APs, APm, APl are `AP_small` …, its APr, APc, APf `AP_rare`, `AP_common`,
        `AP_frequent`.
        """
        values: dict[str, float] = {"AP": self.AP, "AP50": self.AP50, "AP75": self.AP75}
        values |= {f"AP_{name}": value for name, value in self.AP_by_size.items()}
        for name, group in self.groups.items():
            values[f"AP_{name}"] = group.AP
            values[f"AP50_{name}"] = group.AP50
        return values | {"num_images": self.num_images, "num_instances": self.num_instances}


def metrics_of(
    precision: Float[np.ndarray, "t r c 4"],
    num_instances: Mapping[Category, int],
    num_images: int,
) -> Metrics:
    """The metrics of categories that have ground truth.

    `precision` is that of `precision_of`: at IoU thresholds, recall values, the categories of
    `num_instances` in their order, and sizes, of which the first is all.
    """
    categories = list(num_instances)
    by_category = precision[..., 0]
    return Metrics(
        AP=float(by_category.mean()),
        AP50=float(by_category[0].mean()),
        AP75=float(by_category[5].mean()),
        AP_by_size=_size_metrics(precision),
        groups=_group_metrics(categories, by_category),
        AP_by_category={
            category.name: float(by_category[:, :, index].mean())
            for index, category in enumerate(categories)
        },
        AP50_by_category={
            category.name: float(by_category[0, :, index].mean())
            for index, category in enumerate(categories)
        },
        instances_by_category={category.name: count for category, count in num_instances.items()},
        recall=np.linspace(0, 1, by_category.shape[1]),
        precision=by_category[0].mean(axis=-1),
        num_images=num_images,
        num_instances=sum(num_instances.values()),
    )


def _group_metrics(
    categories: Sequence[Category], precision: Float[np.ndarray, "t r c"]
) -> dict[str, GroupMetrics]:
    names = dict.fromkeys(group for category in categories for group in category.groups)
    members = {
        name: precision[:, :, [name in category.groups for category in categories]]
        for name in names
    }
    return {
        name: GroupMetrics(
            AP=float(values.mean()),
            AP50=float(values[0].mean()),
            precision=values[0].mean(axis=-1),
        )
        for name, values in members.items()
    }


def _size_metrics(precision: Float[np.ndarray, "t r c 4"]) -> dict[str, float]:
    """AP of instances by their area; sizes without ground truth are left out."""
    metrics = {}
    for index, name in enumerate(SIZES, start=1):
        values = precision[..., index]
        if (values > -1).any():
            metrics[name] = float(values[values > -1].mean())
    return metrics
