"""A source: a random-access data set of `Record`s with the categories it is evaluated on."""

from typing import Protocol

from data_pipelines.features import Category, Record


class Source(Protocol):
    name: str
    categories: tuple[Category, ...]
    version: str  # of the data set; with a hash of what determines its content

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """The record at `index`. Raises `image_ops.UnreadableImage` if its file cannot be read."""
        ...
