"""YOLO text labels and their data.yaml, mutated: every line is used, or dropped with a reason."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines import image_files
from data_pipelines.open_source import open_source
from owl_det.config import YoloSource
from tests.mutations import harness, pictures, raw, trees
from tests.mutations.harness import Case

_NAMES = ("cat", "traffic light", "dog")
_TOKENS = (
    *("", "0", "1", "2", "3", "-1", "1.0", "0.5", "-0.5", "1.5", "100", "1e400", "nan", "inf"),
    *(
        "cat",
        "0x1",
        "1,2",
        "1_0",
        "\u0661",
        "\u00b2",
        "9" * 400,
        "#",
        "//",
        "\ufeff0",
        "+1",
        "1e-9",
    ),
)
_IMAGE_NAMES = ("images/0.jpg", "images/val/1.png", "images/2.JPG")


@harness.COUNTS
def test_mutated_data_sets(count: int, tmp_path: Path) -> None:
    harness.check(_case, count, tmp_path / "data")


def test_the_unmutated_are_read_whole(tmp_path: Path) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        files = _good(rng)
        case = _written(files, tmp_path / str(seed))
        opened, records = harness.read_and_verify(case)
        assert not opened.counts.dropped
        assert sum(len(record.names) for record in records) == _num_boxes(files)


def _reproduce(seed: int) -> Any:
    return harness.reproduce(_case, seed)


def _case(rng: np.random.Generator, folder: Path) -> Case:
    files = _good(rng)
    for _ in range(rng.integers(1, 4)):
        _mutate(files, rng)
    return _written(files, folder)


def _written(files: dict[str, bytes], folder: Path) -> Case:
    mark = folder / "was_run"
    for name, content in files.items():
        content = content.replace(b"was_run", bytes(mark))
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    entry = YoloSource(path=str(folder))

    def read() -> Any:
        opened = open_source(entry, "")
        return opened, harness.records(opened, str(folder))

    def verify(value: Any, lines: list[str]) -> None:
        assert not mark.exists()
        opened, records = value
        harness.check_counts(opened, records, _num_boxes(files), lines)
        if orphans := _orphans(files):
            assert any("have no image" in line for line in lines), f"not logged: {orphans}"

    # A file of names, and a list of images, may be anywhere.
    return Case(read=read, verify=verify, names=[str(folder), "/etc/passwd"])


def _num_boxes(files: dict[str, bytes]) -> int:
    """All lines, but empty ones, of the label file of each image."""
    labels = {
        _stem(n).casefold(): c for n, c in _below(files, "labels") if n.lower().endswith("txt")
    }
    images = [_stem(name) for name, _ in _below(files, "images") if image_files.is_image(name)]
    texts = [_text(labels.get(image.casefold(), b"")) for image in images]
    return sum(bool(line.strip()) for text in texts for line in re.split("\r\n|\n|\r", text))


def _orphans(files: dict[str, bytes]) -> list[str]:
    """Label files that have lines but no image."""
    images = {_stem(n).casefold() for n, _ in _below(files, "images") if image_files.is_image(n)}
    return [
        name
        for name, content in _below(files, "labels")
        if name.lower().endswith("txt") and _stem(name).casefold() not in images
        if re.search(rb"(^|\n)[0-2]( [01]\.\d+){4,}(\n|$)", content)
    ]


def _below(files: dict[str, bytes], folder: str) -> list[tuple[str, bytes]]:
    return [
        (name.removeprefix(f"{folder}/"), content)
        for name, content in files.items()
        if name.startswith(f"{folder}/") and not image_files.is_hidden(name)
    ]


def _stem(name: str) -> str:
    return str(Path(name).with_suffix(""))


def _text(content: bytes) -> str:
    marks = {b"\xff\xfe\0\0": "utf-32", b"\xff\xfe": "utf-16", b"\xef\xbb\xbf": "utf-8-sig"}
    return content.decode(next((e for m, e in marks.items() if content.startswith(m)), "utf-8"))


# --- good data sets, and mutations ---------------------------------------------------------------


def _good(rng: np.random.Generator) -> dict[str, bytes]:
    """Content by path."""
    names: Any = list(_NAMES) if rng.random() < 0.5 else dict(enumerate(_NAMES))
    data = {"path": ".", "train": "images", "val": "images", "nc": len(_NAMES), "names": names}
    data["kpt_shape"] = [0, 2]  # no keypoints: a few polygons alone may look like poses
    files = {"data.yaml": trees.as_yaml(data, rng).encode()}
    for i in range(int(rng.integers(1, 4))):
        image = _IMAGE_NAMES[i]
        draw = pictures.png if image.endswith("png") else pictures.jpeg
        files[image] = draw(30 + i, 20)
        lines = [_line(rng) for _ in range(int(rng.integers(0 if i else 1, 4)))]
        label = str(Path(image).with_suffix(".txt")).replace("images", "labels")
        files[label] = "".join(f"{line}\n" for line in lines).encode()
    return files


def _line(rng: np.random.Generator) -> str:
    number = int(rng.integers(len(_NAMES)))
    if rng.random() < 0.7:
        size = rng.uniform(0.1, 0.5, 2)
        values = [*rng.uniform(size / 2, 1 - size / 2), *size]
    else:
        values = rng.uniform(0.1, 0.9, 2 * int(rng.integers(3, 8)))
    return " ".join([str(number), *(f"{value:.6f}" for value in values)])


def _mutate(files: dict[str, bytes], rng: np.random.Generator) -> None:
    """One random change of the folder."""
    name = trees.pick(rng, list(files))
    kind = rng.random()
    if kind < 0.1:
        _mutate_file(files, name, rng)
    elif kind < 0.3 and name != "data.yaml":
        files[name] = raw.mutated(files[name], rng)
    elif kind < 0.75:
        name = trees.pick(rng, [n for n in files if n.endswith(".txt")] or ["labels/0.txt"])
        files[name] = _with_other_line(files.get(name, b""), rng)
    else:
        files["data.yaml"] = _mutated_yaml(rng)


def _mutate_file(files: dict[str, bytes], name: str, rng: np.random.Generator) -> None:
    content = files.pop(name)
    others = (
        f"{name}.bak",
        name.upper(),
        name.replace("labels", "label"),
        f"._{name}",
        "classes.txt",
    )
    others += (str(Path(name).parent / f"._{Path(name).name}"), name.replace(".", " (1).", 1))
    if rng.random() < 0.6:
        files[trees.pick(rng, others)] = content


def _with_other_line(content: bytes, rng: np.random.Generator) -> bytes:
    """One line, or a column of it, changes."""
    lines = content.decode("utf-8", "replace").split("\n")
    at = int(rng.integers(len(lines)))
    columns = lines[at].split() or ["0"]
    place = int(rng.integers(len(columns)))
    columns[place] = trees.pick(rng, _TOKENS)
    separator = trees.pick(rng, (" ", "  ", "\t", ",", "\u00a0", "\x0b", "\x85"))
    options = (
        *(" ".join(columns), separator.join(lines[at].split()), f"{lines[at]} 0.9"),
        *(f"{lines[at]} 0.9 12", lines[at].rsplit(" ", 1)[0], lines[at].split(" ")[0], ""),
        *(_line(rng), f"{_line(rng)} 2 0.5 0.5 2", "# a comment", "0 0.5 0.5 0 0", "0 2 2 0.1 0.1"),
        "0 " + " ".join(str(round(x, 1)) for x in rng.uniform(1, 30, 4)),
    )
    lines[at] = trees.pick(rng, (*options, *[" ".join(columns)] * 8))
    return "\n".join(lines).encode("utf-8", "replace")


_YAML = (
    "names: !!python/object/apply:os.system ['touch was_run']\n",
    "!!python/object/new:os.system ['touch was_run']\n",
    "names: [!!python/name:os.system , cat, dog]\n",
    "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n"
        for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    + "names: [cat, traffic light, *i]\n",
    "names: &n [cat, dog, *n]\n",
    "names: [on, off, no]\n",
    "names: [2024-01-01, 1e3, 0o17]\n",
    "names:\n\t- cat\n",
    "names: [cat, traffic light, dog]\nnames: [dog]\n",
    "---\nnames: [cat, traffic light, dog]\n---\nnames: [x]\n",
    "names: {0: cat, 1: traffic light, 0: dog}\n",
    "names: {0: cat, '1': traffic light, 2: dog}\n",
    "names: {<<: {0: cat}, 1: traffic light, 2: dog}\n",
    "? [a, b]\n: 1\nnames: [cat, traffic light, dog]\n",
    "%YAML 9.9\n---\nnames: [cat]\n",
    "names: {? {a: b} : cat}\n",
)


def _mutated_yaml(rng: np.random.Generator) -> bytes:
    if rng.random() < 0.3:
        return trees.pick(rng, _YAML).encode()
    tree: Any = {"train": "images", "nc": len(_NAMES), "names": list(_NAMES)}
    if rng.random() < 0.5:
        tree["names"] = dict(enumerate(_NAMES))
    if rng.random() < 0.2:
        tree["kpt_shape"] = trees.pick(rng, ([17, 3], [2, 2], [0, 0], "17", [1]))
    for _ in range(rng.integers(0, 3)):
        tree = trees.mutated(tree, rng)
    content = trees.as_yaml(tree, rng).encode("utf-8", "surrogatepass")
    return raw.mutated(content, rng) if rng.random() < 0.3 else content
