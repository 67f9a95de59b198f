"""The job under Apache Beam: shards are the elements, workers run `Job.run_shard`.

Input, checkpoint and output paths must be visible to every worker (a shared file system). A shard
that is retried or run twice ends in the same files, because they are renamed when complete.
"""

from collections.abc import Iterator, Sequence

# Not in the base install.
import apache_beam as beam  # pyright: ignore[reportMissingImports]
from apache_beam.options.pipeline_options import (  # pyright: ignore[reportMissingImports]
    PipelineOptions,
)

from owl_det.annotate.job import Settings, open_job


class AnnotateShard(beam.DoFn):
    """Shard number → shard number, once its files are complete."""

    def __init__(self, settings: Settings):
        self._settings = settings

    def setup(self) -> None:
        """A worker that finds another checkpoint or vocabulary than the others must not write."""
        open_job(self._settings).claim()

    def process(self, shard: int) -> Iterator[int]:
        open_job(self._settings).run_shard(shard)
        yield shard


def run(settings: Settings, shards: Sequence[int], options: Sequence[str]) -> None:
    """Runs the shards with the runner and options given in Beam's own flags."""
    with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
        _ = (
            pipeline
            | "Shards" >> beam.Create(list(shards))
            | "Spread" >> beam.Reshuffle()
            | "Annotate" >> beam.ParDo(AnnotateShard(settings))
        )
