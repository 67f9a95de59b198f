"""`owl-det visualize` and `sample`: pictures of what a model computes, and of shapes world."""

import argparse
import sys
from pathlib import Path

from owl_det import files
from owl_det.cli import options, summary
from owl_det.cli.images import exit_code, image_paths, picture_paths
from owl_det.cli.options import Commands, local_path


def add_visualize(commands: Commands) -> None:
    parser = commands.add_parser("visualize", help="pictures of what a model computes")
    kinds = parser.add_subparsers(dest="kind", required=True)
    features = kinds.add_parser("features", help="token embeddings: clusters, likeness to texts")
    options.add_images(features)
    options.add_checkpoint(features, "workdir or checkpoint, of any kind")
    features.add_argument("--query", action="append", default=[], help="a heat map of it; repeat")
    features.add_argument(
        "--num_clusters",
        type=options.count("--num_clusters"),
        default=6,
        help="colours of the picture",
    )
    options.add_image_size(features)
    features.add_argument(
        "--prompts", default="", choices=("none", "clip", "clip_best7"), help="default: as trained"
    )
    features.add_argument(
        "--out", type=local_path, required=True, metavar="DIR", help="where the pictures go"
    )
    features.set_defaults(run=_visualize_features)


def _visualize_features(arguments: argparse.Namespace) -> int:
    """One PNG an image: the image, its clusters, a heat map a query. Prints the paths."""
    import numpy as np

    from data_pipelines import image_ops
    from data_pipelines.image_ops import UnreadableImage
    from owl_det.checkpoints.image_size import resized
    from owl_det.checkpoints.load import load_model
    from owl_det.inference import dense_features, text_queries
    from owl_det.viz.features import draw_clusters, draw_heat, show
    from owl_det.viz.pictures import picture_grid, save_png, titled

    paths = image_paths(arguments.images, arguments.out)
    options.check_folder("--out", arguments.out)
    queries = text_queries.texts(arguments.query) if arguments.query else ()
    model = load_model(arguments.checkpoint)
    if arguments.image_size:
        model = resized(model, arguments.image_size)
    features = dense_features.DenseFeatures(model)
    read: list[tuple[Path, Path]] = []
    grids: list[np.ndarray] = []
    for path, target in zip(paths, picture_paths(Path(arguments.out), paths), strict=True):
        try:
            grids.append(features.embed(image_ops.decode_image(files.read_bytes(path))))
            read.append((path, target))
        except (UnreadableImage, OSError) as error:
            print(f"owl-det: skipped {path}: {error}", file=sys.stderr)
    if not read:
        return exit_code(len(paths), len(paths))
    texts = features.encode(queries, arguments.prompts) if queries else []
    clusters = dense_features.cluster(grids, arguments.num_clusters)
    for (path, target), grid, labels in zip(read, grids, clusters, strict=True):
        image = image_ops.decode_image(files.read_bytes(path))  # again: not all fit into memory
        pixels, extent = np.asarray(image), features.extent(image)
        coloured = draw_clusters(pixels, labels, extent, arguments.num_clusters)
        pictures = [show(pixels, "image"), titled(coloured, "clusters")]
        for query, text in zip(queries, texts, strict=True):
            pictures.append(draw_heat(pixels, grid @ text, extent, query))
        save_png(target, picture_grid(pictures))
        print(target)
    summary.say(f"{summary.many(len(read), 'picture')} in {arguments.out}")
    return exit_code(len(paths) - len(read), len(paths))


def add_sample(commands: Commands) -> None:
    parser = commands.add_parser("sample", help="write images of the embedded data set as PNG")
    parser.add_argument(
        "--out", type=local_path, required=True, metavar="DIR", help="where the images go"
    )
    parser.add_argument(
        "--num_images", type=options.count("--num_images"), default=4, help="pictures to draw"
    )
    parser.add_argument(
        "--image_size", type=options.count("--image_size"), default=64, help="side in pixels"
    )
    parser.set_defaults(run=_sample)


def _sample(arguments: argparse.Namespace) -> int:
    from data_pipelines import image_ops
    from data_pipelines.shapes_world import ShapesWorld

    options.check_folder("--out", arguments.out)
    world = ShapesWorld(
        split="test", image_size=arguments.image_size, num_images=arguments.num_images
    )
    out = Path(arguments.out)
    for index in range(len(world)):
        path = out / f"shapes_{index:04d}.png"
        record = world[index]
        with files.atomic(path) as partial:
            image_ops.decode_image(record.image).save(partial, format="PNG")
        names = ", ".join(name for group in record.names for name in group)
        print(f"{path}: {names}")
    summary.say(f"{summary.many(len(world), 'image')} in {out}")
    return 0
