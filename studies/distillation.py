"""Four ways of distillation in miniature, each beside its control.

    python -m studies.distillation --workdir=W                       every arm once, and the report
    python -m studies.distillation --workdir=W --seeds=3 --report    the same with three seeds
    python -m studies.distillation --workdir=W --arms=clipself       some arms, with what they need
    python -m studies.distillation --draw                            the report of what is there

One teacher, small towers that see a picture at a time, teaches tokens of scenes (CLIPSelf,
DenseVLM) and detectors of base names (GridCLIP, HierKD). Arms that are compared take the same
number of steps at the same batch size. Dense features are measured on scenes with stuff, at the
students' size; detectors are asked for every base and novel name at once, on shapes world's test
split.
"""

import json
import sys
from pathlib import Path

from studies import arms
from studies.arms import Arm, Claim, Metrics, Study
from studies.owl_st import read_training

SIDE = 64  # of the students' input, pixels
TEST_IMAGES = 512
TRAIN_IMAGES = 4096
TOWER_STEPS = 500
DETECTOR_STEPS = 2000
ALPHA = 0.7  # share of the student in the average of the weights, as CLIPSelf's code for B/16
NOVEL, BASE = "AP50_novel", "AP50_base"
POINTING, ABOVE_CHANCE = "pointing_novel", "pointing_above_chance_novel"
# Five of 125 names: a box holds ground too, and its crop is often named by that first.
BOXES = "boxes_top5"


# --- what an arm leaves ------------------------------------------------------------------------


def read_towers(folder: Path) -> Metrics:
    """Accuracies of dense features by kind of region, and of whole pictures of single objects."""
    regions = json.loads((folder / "regions.json").read_text())
    whole = json.loads((folder / "whole.json").read_text())
    kept = {key: x for key, x in regions.items() if "_top" in key and isinstance(x, float)}
    return {**kept, "whole_top1": whole["recall_at_1"]}


def read_quality(folder: Path) -> Metrics:
    """What `studies.teacher_quality` wrote."""
    return json.loads((folder / "quality.json").read_text())


def read_teacher(folder: Path) -> Metrics:
    """Of both evaluation sets of the pretraining."""
    sets = json.loads((folder / "eval" / "summary.json").read_text())["datasets"]
    return {"zero_shot_top1": sets["image_text"]["zero_shot_top1"]}


def read_detector(folder: Path) -> Metrics:
    """As of every training, and how much better than chance the tokens point at novel objects."""
    metrics = read_training(folder)
    above = metrics["pointing_novel"] - metrics["pointing_chance_novel"]
    return {**metrics, ABOVE_CHANCE: round(above, 4)}


# --- arms --------------------------------------------------------------------------------------


def training(config: str, *overrides: str) -> tuple[str, ...]:
    """The command of a training; the seed is the study's."""
    return (
        "owl_det.main",
        f"--config=configs/{config}.py",
        "--workdir={out}",
        "--config.seed={seed}",
        *(f"--config.{override}" for override in overrides),
    )


def measure(checkpoint: str) -> tuple[tuple[str, ...], ...]:
    """The commands whose output `read_towers` reads."""
    common = (
        *("owl_det.cli", "evaluate-regions", f"--checkpoint={checkpoint}"),
        *("--dataset=shapes_world", f"--image_size={SIDE}", "--batch_size=64"),
        f"--max_images={TEST_IMAGES}",
    )
    return (
        (*common, "--split=panoptic_test", "--out={out}/regions.json"),
        (*common, "--split=image_text_test", "--out={out}/whole.json"),
    )


def towers(
    name: str, config: str, title: str, *overrides: str, needs: tuple[str, ...] = ("teacher",)
) -> Arm:
    """A fine-tuning of the teacher's own towers, on unlabelled scenes with stuff."""
    command = training(
        config,
        *("checkpoint.init_from={teacher}", "distill.teacher={teacher}"),
        f"checkpoint.image_size={SIDE}",
        f"num_steps={TOWER_STEPS}",
        "distill.regions.max_regions=12",
        "data.train.shapes.split=panoptic",
        f"data.train.shapes.num_images={TRAIN_IMAGES}",
        *overrides,
    )
    commands = (command, *measure("{out}"))
    return Arm(name=name, commands=commands, read=read_towers, needs=needs, title=title)


def detector(name: str, title: str, *overrides: str) -> Arm:
    """A detector on human boxes of base names, from the teacher's towers."""
    command = training(
        "annotator_shapes",
        *("checkpoint.init_from={teacher}", "distill.teacher={teacher}"),
        "model.text.num_positions=24",  # captions are longer than names
        "data.with_captions=True",
        f"num_steps={DETECTOR_STEPS}",
        f"data.train.shapes.num_images={TRAIN_IMAGES}",
        f"data.eval.shapes.num_images={TEST_IMAGES}",
        f"evaluation.every_steps={DETECTOR_STEPS // 2}",
        *overrides,
    )
    return Arm(name=name, commands=(command,), read=read_detector, needs=("teacher",), title=title)


def densevlm(name: str, title: str, *overrides: str) -> Arm:
    """The names of regions come from the tokens that CLIPSelf has taught."""
    return towers(
        name,
        "densevlm_shapes",
        title,
        "distill.dense_teacher={clipself}",
        *overrides,
        needs=("teacher", "clipself"),
    )


GRIDCLIP_IMAGE = "distill.gridclip_image.weight=10.0"
IKD = "distill.hierkd_instance.weight=1.0"
IKD_CROPS = "distill.hierkd_instance.max_crops=6"
CLIPSELF = "distill.clipself.weight=1.0"
GKD = "distill.hierkd_global.weight=1.0"
FEW_NEGATIVES = "loss.negative_share=0.1"
SHUFFLED = "distill.shuffle_targets=True"

ARMS = (
    Arm(
        name="teacher",
        commands=(training("teacher_shapes"),),
        read=read_teacher,
        title="contrastive pretraining on pictures of 32 pixels",
    ),
    Arm(
        name="crops",
        commands=(
            (
                *("studies.teacher_quality", "--checkpoint={teacher}"),
                f"--num_images={TEST_IMAGES}",
                "--out={out}/quality.json",
            ),
        ),
        read=read_quality,
        needs=("teacher",),
        title="the teacher on crops of true boxes, and RC@k of its image vector",
    ),
    Arm(
        name="before",
        commands=measure("{teacher}"),
        read=read_towers,
        needs=("teacher",),
        title="the teacher's tokens of whole scenes, as they are",
    ),
    # CLIPSelf.
    towers("clipself", "clipself_shapes", "CLIPSelf, random grids"),
    towers(
        "clipself_whole",
        "clipself_shapes",
        "control: CLIPSelf, the one cell of a 1 x 1 grid",
        "distill.regions.grids=whole",
    ),
    # By itself: `owl-det ensemble` refuses a folder that is there, so nothing may go on after it.
    Arm(
        name="average",
        commands=(
            (
                *("owl_det.cli", "ensemble", "--self_trained={teacher}"),
                *("--fine_tuned={clipself}", f"--weight={ALPHA}", "--out={out}/towers"),
            ),
        ),
        read=lambda folder: {"alpha": ALPHA},
        needs=("teacher", "clipself"),
        title="average of weights: 0.7 of CLIPSelf's, 0.3 of the teacher's",
    ),
    Arm(
        name="clipself_average",
        commands=measure("{average}/towers"),
        read=read_towers,
        needs=("average",),
        title="what the average knows",
    ),
    # DenseVLM.
    densevlm("densevlm", "DenseVLM, decoupled: things apart from stuff"),
    densevlm("densevlm_all", "control: every region against all names",
             "distill.densevlm.contrast=all"),
    densevlm("densevlm_separate", "control: stuff against stuff alone",
             "distill.densevlm.contrast=separate"),
    densevlm("densevlm_none", "control: a threshold of 1, which no region passes; fewer steps",
             "distill.densevlm.threshold=1.0", "num_steps=50"),
    # Detectors.
    detector("detector", "control: no distillation"),
    detector("gridclip_image", "GridCLIP, image level", GRIDCLIP_IMAGE),
    detector("gridclip_shuffled", "control: image vectors of other images",
             GRIDCLIP_IMAGE, SHUFFLED),
    detector("gridclip_light", "GridCLIP, image level, a tenth of the weight",
             "distill.gridclip_image.weight=1.0"),
    detector("few_negatives", "a tenth of the negatives", FEW_NEGATIVES),
    detector("ikd", "HierKD, instance level", IKD, IKD_CROPS),
    detector("ikd_light", "HierKD, instance level: L2, weight 0.05, as its released config",
             "distill.hierkd_instance.weight=0.05", "distill.hierkd_instance.norm=l2", IKD_CROPS),
    detector("ikd_few_negatives", "both", IKD, IKD_CROPS, FEW_NEGATIVES),
    detector("ikd_regions", "instance level and CLIPSelf; its cells show novel objects too",
             IKD, IKD_CROPS, CLIPSELF, "distill.regions.max_regions=12"),
    detector("ikd_boxes", "control: CLIPSelf on the labelled boxes, which show base objects",
             IKD, IKD_CROPS, CLIPSELF, "distill.regions.kind=proposals",
             "distill.regions.max_regions=6"),
    detector("gkd", "HierKD, global level", GKD),
    detector("gkd_light", "HierKD, global level, a tenth of the weight",
             "distill.hierkd_global.weight=0.1"),
    detector("gkd_shuffled", "control: captions of other images", GKD, SHUFFLED),
    detector("gkd_mean", "control: cells pooled by their mean", GKD,
             "distill.hierkd_global.pooling=mean"),
    detector("gkd_positive", "control: no contrast, the own caption alone", GKD,
             "distill.hierkd_global.objective=positive"),
)  # fmt: skip

SLOWER = (
    "At the paper's weight, beside losses that are normalised by example and clipped at norm 1, "
    "every branch slows the detector: compare the arm of a tenth of the weight."
)

CLAIMS = (
    Claim(
        statement="Before, tokens name regions far worse than the teacher names crops",
        arm="crops",
        control="before",
        metric=BOXES,
        at_least=0.1,
    ),
    Claim(
        statement="CLIPSelf lifts them far above that",
        arm="clipself",
        control="before",
        metric=BOXES,
        at_least=0.1,
    ),
    Claim(
        statement="… and above the 1 x 1 grid's",
        arm="clipself",
        control="clipself_whole",
        metric=BOXES,
        at_least=0.1,
    ),
    Claim(
        statement="It comes within ten points of the crops",
        arm="clipself",
        control="crops",
        metric=BOXES,
        at_least=-0.1,
    ),
    Claim(
        statement="It costs accuracy on whole pictures",
        arm="before",
        control="clipself",
        metric="whole_top1",
    ),
    Claim(
        statement="… of which the average of the weights recovers a part",
        arm="clipself_average",
        control="clipself",
        metric="whole_top1",
    ),
    Claim(
        statement="The image vector recalls less of fuller scenes (RC@10)",
        arm="crops",
        control="",
        metric="recall_fall",
        at_least=0.05,
    ),
    Claim(
        statement="GridCLIP's image alignment lifts novel names",
        arm="gridclip_image",
        control="detector",
        metric=NOVEL,
        note=SLOWER,
    ),
    Claim(
        statement="… at a tenth of the weight",
        arm="gridclip_light",
        control="detector",
        metric=NOVEL,
    ),
    Claim(
        statement="… above shuffled targets",
        arm="gridclip_image",
        control="gridclip_shuffled",
        metric=NOVEL,
    ),
    Claim(
        statement="… which lift them by less than a point",
        arm="detector",
        control="gridclip_shuffled",
        metric=NOVEL,
        at_least=-0.01,
    ),
    Claim(
        statement="Base names lose at most a point by it",
        arm="gridclip_image",
        control="detector",
        metric=BASE,
        at_least=-0.01,
    ),
    Claim(
        statement="DenseVLM decoupled beats all names on stuff",
        arm="densevlm",
        control="densevlm_all",
        metric="stuff_masks_top1",
    ),
    Claim(
        statement="… and fully separated",
        arm="densevlm",
        control="densevlm_separate",
        metric="stuff_masks_top1",
        note="Names of stuff that never compete with things are given to things too: see boxes.",
    ),
    Claim(
        statement="… and fully separated on boxes",
        arm="densevlm",
        control="densevlm_separate",
        metric="boxes_top1",
    ),
    Claim(
        statement="It lifts stuff above the start",
        arm="densevlm",
        control="before",
        metric="stuff_masks_top1",
    ),
    Claim(
        statement="Where no region passes, nothing breaks, nothing is learned",
        arm="densevlm_none",
        control="before",
        metric="stuff_masks_top1",
        at_least=-1e-6,
    ),
    Claim(
        statement="… in either direction",
        arm="before",
        control="densevlm_none",
        metric="stuff_masks_top1",
        at_least=-1e-6,
    ),
    Claim(
        statement="Instance-level distillation lifts novel names",
        arm="ikd",
        control="detector",
        metric=NOVEL,
        note=SLOWER,
    ),
    Claim(
        statement="… at the weight of the released config",
        arm="ikd_light",
        control="detector",
        metric=NOVEL,
    ),
    Claim(
        statement="A tenth of the negatives does",
        arm="few_negatives",
        control="detector",
        metric=NOVEL,
    ),
    Claim(
        statement="… and with it instance-level distillation still does",
        arm="ikd_few_negatives",
        control="few_negatives",
        metric=NOVEL,
    ),
    Claim(
        statement="Crops that show novel objects too lift novel names more than base crops",
        arm="ikd_regions",
        control="ikd_boxes",
        metric=NOVEL,
    ),
    Claim(
        statement="Base names lose at most a point by instance-level distillation",
        arm="ikd",
        control="detector",
        metric=BASE,
        at_least=-0.01,
    ),
    Claim(
        statement="Global-level distillation lifts novel names",
        arm="gkd",
        control="detector",
        metric=NOVEL,
        note=SLOWER,
    ),
    Claim(
        statement="… at a tenth of the weight",
        arm="gkd_light",
        control="detector",
        metric=NOVEL,
    ),
    Claim(
        statement="… above shuffled captions",
        arm="gkd",
        control="gkd_shuffled",
        metric=NOVEL,
    ),
    Claim(
        statement="… which lift them by less than a point",
        arm="detector",
        control="gkd_shuffled",
        metric=NOVEL,
        at_least=-0.01,
    ),
    Claim(
        statement="The token nearest to a novel name then lies in its box more often than chance",
        arm="gkd",
        control="",
        metric=ABOVE_CHANCE,
    ),
    Claim(
        statement="… and more often than without",
        arm="gkd",
        control="detector",
        metric=POINTING,
    ),
    Claim(
        statement="… and than with shuffled captions",
        arm="gkd",
        control="gkd_shuffled",
        metric=POINTING,
    ),
    Claim(
        statement="Cells pooled by their maximum beat those by their mean",
        arm="gkd",
        control="gkd_mean",
        metric=NOVEL,
    ),
    Claim(
        statement="Contrast beats the own caption alone",
        arm="gkd",
        control="gkd_positive",
        metric=NOVEL,
    ),
)

STUDY = Study(
    name="distillation",
    title="Distillation in miniature",
    arms=ARMS,
    main=tuple(arm.name for arm in ARMS),
    claims=CLAIMS,
    results=Path(__file__).parent / "results" / "distillation",
    columns=(
        ("boxes top-1", "boxes_top1"),
        ("boxes top-5", BOXES),
        ("thing masks top-1", "thing_masks_top1"),
        ("stuff masks top-1", "stuff_masks_top1"),
        ("whole pictures top-1", "whole_top1"),
        ("AP50 base", BASE),
        ("AP50 novel", NOVEL),
        ("AP50 novel combination", "AP50_novel_combination"),
        ("AP50 novel word", "AP50_novel_word"),
        ("pointing at novel", POINTING),
    ),
    bars=(
        (BOXES, "names of boxes among the nearest five (percent, mean over names)"),
        ("stuff_masks_top1", "names of stuff masks right (percent, mean over names)"),
        (NOVEL, "AP50 of novel names (percent)"),
    ),
    curves=("detector", "gridclip_image", "ikd", "gkd"),
    pictures=(("The undistilled detector's detections", "detector", "pictures/shapes_*.png"),),
)


def main(argv: list[str] | None = None) -> int:
    return arms.command(STUDY, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
