"""Runs an annotation job: one process or Apache Beam does the shards that are left to do."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import logging

from owl_det import console
from owl_det.annotate.job import Job, Settings, open_job
from owl_det.errors import DataError
from owl_det.optional import installation, is_installed


def run_job(
    settings: Settings,
    *,
    shard_index: int | None = None,
    shard_step: int = 0,
    runner: str = "direct",
    beam_options: Sequence[str] = (),
) -> Job:
    """Does what is left to do; when all shards are complete, writes the report.

    This process takes the shards of `shard_range`. Raises `UserError` for what a user can mend.
    """
    if beam_options and runner != "beam":
        raise DataError(f"--beam_option: is for --runner beam, not {runner}")
    job = open_job(settings)
    job.claim()
    if jax.local_device_count() > 1:
        logging.warning(
            "Of %d devices one is used; docs/annotate.md says how each gets a process of its own",
            jax.local_device_count(),
        )
    mine = shard_range(len(job.shards), shard_index, shard_step)
    todo = [shard for shard in mine if not job.is_complete(shard)]
    logging.info("%d of %d shards are left to do", len(todo), len(job.shards))
    if runner == "beam":
        if not is_installed("apache_beam"):
            raise DataError(f"--runner beam: needs Apache Beam: {installation('beam')}")
        from owl_det.annotate import beam_runner

        beam_runner.run(settings, todo, beam_options)
    else:
        for shard in console.progress(todo, unit="shard"):
            job.run_shard(shard)
    if all(job.is_complete(shard) for shard in range(len(job.shards))):
        from owl_det.annotate import report

        remove_partial(job.folder)
        job.report = report.write(job.folder, job.space, job.counts())
    return job


def shard_range(num_shards: int, index: int | None, step: int) -> range:
    """The shards of one process: all, one, or every `step`-th from `index` on.

    An `index` beyond the last shard is an empty range where there is a step: there may be more
    processes than shards. Otherwise raises `DataError` for what names no shard.
    """
    if step < 0 or (step and index is None):
        raise DataError(
            f"--shard_step: {step}; give a positive one, with the --shard_index of this process"
        )
    if index is None:
        return range(num_shards)
    if index < 0 or (index >= num_shards and not step):
        raise DataError(f"--shard_index: {index}, but there are shards 0 to {num_shards - 1}")
    return range(index, num_shards, step) if step else range(index, index + 1)


def settings_of(arguments: argparse.Namespace) -> Settings:
    """The settings that the flags of `owl-det annotate` say."""
    return Settings(
        checkpoint=arguments.checkpoint,
        input=arguments.input,
        output=arguments.output,
        labels=arguments.labels,
        vocabularies=tuple(arguments.vocabularies),
        max_ngrams=arguments.max_ngrams,
        prompts=arguments.prompts,
        num_shards=arguments.num_shards,
        batch_size=arguments.batch_size,
        min_box_score=arguments.min_box_score,
        min_image_score=arguments.min_image_score,
        keep_below=arguments.keep_below,
        num_threads=arguments.num_threads,
        hard_negatives=arguments.hard_negatives,
    )


def remove_partial(folder: Path) -> None:
    """Removes temporary files of processes that were killed."""
    for path in folder.glob(".*.partial"):
        path.unlink(missing_ok=True)
