"""Cached teachers say, and train, as those that run; what a cache cannot know is refused."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors import safe_open

from data_pipelines import teacher_cache
from data_pipelines.input import TrainInput
from data_pipelines.shapes_world import ShapesWorld
from owl_det import cli, sharding
from owl_det.config import Config, MeshConfig, ShapesWorldSource
from owl_det.distillation import branches, cache_teacher, select, teachers
from owl_det.distillation.cache_request import cache_request
from owl_det.errors import ConfigError, DataError, ExitCode
from tests import tiny, tiny_distillation


def _open(config: Config) -> TrainInput:
    return TrainInput(config, cache_request(config))


def _cached_config(
    folder: str,
    cache: Path | None,
    names: Sequence[str] = tuple(tiny_distillation.WEIGHTS),
    **regions: Any,
) -> Config:
    distill = {"teacher": folder, "regions": {"max_regions": 6, **regions}}
    distill |= {"cache": str(cache)} if cache else {}
    source = {"kind": "shapes_world", "image_size": 32, "num_images": 6}
    return tiny_distillation.config(*names, data__train={"shapes": source}, distill=distill)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("patches", ("gridclip_image", "clipself")),
        *(
            pytest.param(kind, tuple(tiny_distillation.WEIGHTS), marks=pytest.mark.nightly)
            for kind in ("patches", "proposals")
        ),
    ],
)
def test_a_cache_says_what_the_teacher_says(
    kind: str, names: tuple[str, ...], teacher_folder: str, tmp_path: Path
) -> None:
    online = _cached_config(teacher_folder, None, names, kind=kind)
    counts = cache_teacher.run(online, tmp_path / "cache", shard_size=4, batch_size=4)
    assert counts == {"images": 6, "unreadable": 0, "shards": 2, "shards_there": 0}
    cached = _cached_config(teacher_folder, tmp_path / "cache", names, kind=kind)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    signals = []
    for made in (online, cached):
        teaching, batch = teachers.open_teachers(made, mesh), tiny.batch(made)
        assert teaching is not None
        signals.append(jax.jit(lambda a, b, t=teaching: t.signals(a, b))(teaching.arrays, batch))
        assert ("image" in teaching.arrays) == (made is online)
    wanted = branches.needs(online.distill) & set(teacher_cache.SIGNALS)
    for field in wanted:
        ours, theirs = (np.asarray(s[field]) for s in signals)
        is_real = _is_real(field, online)
        assert is_real.any() and ours.shape == theirs.shape, field
        # float16 holds eleven bits.
        np.testing.assert_allclose(ours[is_real], theirs[is_real], atol=1e-3, err_msg=field)


def test_a_cache_of_dense_features_knows_whose_they_are(
    teacher_folder: str, tmp_path: Path
) -> None:
    """Without a dense teacher of its own, DenseVLM's is the teacher: another one is refused."""
    made = _cached_config(teacher_folder, None, ["densevlm"])
    cache_teacher.run(made, tmp_path / "cache", shard_size=8, batch_size=8)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    teachers.open_teachers(_cached_config(teacher_folder, tmp_path / "cache", ["densevlm"]), mesh)
    other = tiny_distillation.save_towers(tmp_path / "other", model__image__width=48)
    with pytest.raises(ConfigError, match="is not the checkpoint that config.distill.cache"):
        teachers.open_teachers(_cached_config(other, tmp_path / "cache", ["densevlm"]), mesh)


def test_a_branch_without_a_teacher_trains_beside_a_cache(
    teacher_folder: str, tmp_path: Path
) -> None:
    made = _cached_config(teacher_folder, None, ["gridclip_image"])
    cache_teacher.run(made, tmp_path / "cache", shard_size=8, batch_size=8)
    cached = _cached_config(teacher_folder, tmp_path / "cache", ["gridclip_grid"])
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    teaching = teachers.open_teachers(cached, mesh)
    assert teaching is not None
    signals = teaching.signals(teaching.arrays, tiny.batch(cached))
    assert jax.tree.leaves(signals) == []


@pytest.mark.nightly
def test_a_mosaic_finds_the_vectors_of_its_tiles(teacher_folder: str, tmp_path: Path) -> None:
    """Of each tile its image's, of each object that of its box, whatever the order."""
    names, cache = ("gridclip_image", "hierkd_instance"), tmp_path / "cache"
    made = _cached_config(teacher_folder, None, names)
    cache_teacher.run(made, cache, shard_size=8, batch_size=8)
    mosaics = dataclasses.replace(made.data.augment, mosaic_sizes=(2,), mosaic_probabilities=(1.0,))
    cached = dataclasses.replace(
        made,
        data=dataclasses.replace(made.data, augment=mosaics),
        distill=dataclasses.replace(made.distill, cache=str(cache)),
    )
    batch = jax.tree.map(np.asarray, tiny.batch(cached))
    assert batch.teacher is not None
    with safe_open(cache / "shapes" / "000000.safetensors", "numpy") as file:
        tiles, instances, start = map(file.get_tensor, ("tiles", "instances", "box_start"))
    world = ShapesWorld(image_size=32, num_images=6)
    compared = 0
    for b, t in np.argwhere(batch.tile_image_id >= 0):
        image = int(batch.tile_image_id[b, t])
        np.testing.assert_allclose(batch.teacher["tiles"][b, t], tiles[image], atol=1e-3)
        x, y, w, h = batch.tile_boxes[b, t]
        corners = world[image].boxes_xyxy / 32 * [w, h, w, h] + [x - w / 2, y - h / 2] * 2
        centres = (corners[:, :2] + corners[:, 2:]) / 2
        for slot in np.flatnonzero(batch.is_instance[b]):
            distance = np.abs(centres - batch.boxes[b, slot, :2]).max(-1, initial=0)
            for row in np.flatnonzero(distance < 0.005):
                expected = instances[start[image] + row]
                np.testing.assert_allclose(batch.teacher["instances"][b, slot], expected, atol=1e-3)
                compared += 1
    assert compared >= batch.is_instance.sum() > 4


def _is_real(field: str, made: Config) -> np.ndarray:
    """Which rows of a signal stand for something, by the batch alone."""
    batch = tiny.batch(made)
    chosen = select.choose_instances(
        batch.boxes, batch.is_instance, made.distill.hierkd_instance.max_crops
    )
    masks: dict[str, Any] = {
        "tiles": batch.tile_image_id >= 0,
        "instances": select.take_rows(batch.is_instance, chosen),
        "captions": batch.is_caption,
        "regions": batch.is_region,
        "dense_regions": batch.is_region,
    }
    return np.asarray(masks[field])


def test_a_cache_goes_on_where_it_stopped_and_fits_nothing_else(
    teacher_folder: str, tmp_path: Path
) -> None:
    made = _cached_config(teacher_folder, None, ["gridclip_image"])
    folder = tmp_path / "cache"
    cache_teacher.run(made, folder, shard_size=4, batch_size=2, shard_index=1, shard_step=2)
    cached = _cached_config(teacher_folder, folder, ["gridclip_image"])
    with pytest.raises(DataError, match="000000.safetensors: is missing; run the same"):
        _open(cached)
    before = (folder / "shapes" / "000001.safetensors").read_bytes()
    counts = cache_teacher.run(made, folder, shard_size=4, batch_size=2)
    assert counts["shards"] == 1 and counts["shards_there"] == 1
    assert (folder / "shapes" / "000001.safetensors").read_bytes() == before
    _open(cached)
    other = dataclasses.replace(cached, model=dataclasses.replace(cached.model, image_size=16))
    with pytest.raises(DataError, match="was made with another image_size: 32 there, 16 in"):
        _open(other)
    source = dataclasses.replace(cached.data.train["shapes"], num_images=11)
    more = dataclasses.replace(cached.data, train={"shapes": source})
    with pytest.raises(DataError, match="another data set shapes"):
        _open(dataclasses.replace(cached, data=more))
    # Vectors of another checkpoint under the folder's name.
    manifest = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(
        re.sub('"teacher_id": "[0-9a-f]*"', '"teacher_id": "0000"', manifest, count=1)
    )
    with pytest.raises(DataError, match="vectors of two checkpoints do not mix"):
        _open(cached).example(0)


def test_a_cache_of_drawings_of_another_size_is_refused(
    teacher_folder: str, tmp_path: Path
) -> None:
    cache_teacher.run(_cached_config(teacher_folder, None, ["clipself"]), tmp_path / "cache")
    made = _cached_config(teacher_folder, tmp_path / "cache", ["clipself"])
    _open(made)
    ((name, entry),) = made.data.train.items()
    assert isinstance(entry, ShapesWorldSource)
    smaller = dataclasses.replace(entry, image_size=entry.image_size // 2)
    changed = dataclasses.replace(made, data=dataclasses.replace(made.data, train={name: smaller}))
    with pytest.raises(DataError, match="another data set"):
        _open(changed)


@pytest.mark.nightly
def test_a_cache_trains_as_its_teacher(teacher_folder: str, tmp_path: Path) -> None:
    online = _cached_config(teacher_folder, None)
    cache_teacher.run(online, tmp_path / "cache", shard_size=16, batch_size=2)
    cached = _cached_config(teacher_folder, tmp_path / "cache")
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    found = [
        tiny_distillation.take(made, teachers.open_teachers(made, mesh))[1]
        for made in (online, cached)
    ]
    for name in ("loss", *(f"distill/{name}" for name in tiny_distillation.WEIGHTS)):
        np.testing.assert_allclose(found[1][name], found[0][name], rtol=2e-3, err_msg=name)


def test_the_command_takes_changes_of_the_config_and_refuses_its_former_option(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[Config] = []

    def run(config: Config, *_: object, **__: object) -> dict[str, int]:
        made.append(config)
        return {"unreadable": 0}

    monkeypatch.setattr("owl_det.distillation.cache_teacher.run", run)
    command = ["cache-teacher", "--config=distill_shapes", f"--out={tmp_path}"]
    changes = ["--config.distill.teacher=some/folder", "--config.data.train.shapes.num-images", "9"]
    assert cli.main([*command, *changes, "--config.data.augment.crop_probability=0"]) == 0
    source = made[0].data.train["shapes"]
    assert isinstance(source, ShapesWorldSource) and source.num_images == 9
    assert made[0].distill.teacher == "some/folder"
    capsys.readouterr()
    for argument, message in (
        ("--config.distill.teachr=x", "config.distill.teachr: no such key; did you mean"),
        ("--config.distill", "config.distill"),
        ("--shard_sise=2", "unknown arguments: --shard_sise=2; did you mean --shard_size?"),
        ("--set=distill.teacher=T", "write --config.distill.teacher=T; see"),
    ):
        try:
            assert cli.main([*command, argument]) == ExitCode.REFUSED
        except SystemExit as stopped:
            assert stopped.code == ExitCode.REFUSED
        shown = capsys.readouterr().err
        assert message in shown and shown.count("\n") == 1


def test_a_config_without_teachers_has_nothing_to_cache(tmp_path: Path) -> None:
    plain = tiny_distillation.config()
    with pytest.raises(ConfigError, match="no active branch has teacher outputs to cache"):
        cache_teacher.run(plain, tmp_path / "cache")
