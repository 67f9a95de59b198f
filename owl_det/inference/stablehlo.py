"""Exported models: what lies in the folder that `owl-det export` writes, and how it is loaded.

    <folder>/export.json                  model, preprocessing, prompts, tokenizer, fingerprints
             tokenizer.json               where the checkpoint has one (or spiece.model)
             params.safetensors           parameters, float32, named by their path in the tree
             encode_queries.jax_export    (params, tokens) → embeddings
             embed_tokens.jax_export      (params, pixels) → what decides each token's scores

The two functions are StableHLO in `jax.export`'s envelope, lowered for every platform in
`PLATFORMS`, with symbolic numbers of images (b), prompts (t) and queries (q). Queries are scored
and ranked outside, by `ranking.rank`, so that every use of a checkpoint is one of an export.

Loading needs JAX, and neither Flax nor Orbax. The files are untrusted: sizes, hashes, shapes and
types are checked before parameters are allocated, and a function that calls outside XLA is refused.
"""

import json
import os
import re
from pathlib import Path
from typing import Any, TypeAlias, cast

import jax
import jax.export
import safetensors
from jaxtyping import Array, Float, Int32, UInt8

from data_pipelines import prompts, tokenizer
from owl_det import files, path_rules
from owl_det.checkpoints import finite
from owl_det.config import ModelConfig
from owl_det.config.resolve import resolve_model
from owl_det.errors import CheckpointError, ConfigError
from owl_det.inference.export_folder import METADATA
from owl_det.inference.ranking import DetectorFunctions
from owl_det.types import LoadedModel, Params, TokenEmbeddings

VERSION = 1  # of the metadata
PLATFORMS = ("cpu", "cuda", "tpu")
PARAMS = "params.safetensors"
ENCODE_QUERIES = "encode_queries.jax_export"
EMBED_TOKENS = "embed_tokens.jax_export"

MAX_METADATA_BYTES = 1 << 20
MAX_FUNCTION_BYTES = 1 << 26  # parameters are not inside: a function takes some ten thousand bytes
# `shape_assertion` is how jax.export checks symbolic sizes. Any other custom call reaches native
# code with arguments that the file chooses.
NATIVE_CALL = re.compile(r"custom_call(?! @shape_assertion\()[^\n(]{0,40}")

# Of each token, one number each.
PER_TOKEN = ("embedding_norm", "logit_shift", "logit_scale", "objectness_logits")

# Sizes, those that are symbolic by their letter, and dtype.
Signature: TypeAlias = tuple[tuple[int | str, ...], str]


def load(path: str | os.PathLike[str]) -> tuple[LoadedModel, DetectorFunctions]:
    """Loads a StableHLO export: parameters, and the functions that take them.

    Raises `CheckpointError`, naming the file, where one is missing, damaged, of another export or
    another format, or would run more than array computations.
    """
    folder = Path(path)
    metadata = _read_metadata(folder)
    where = folder / METADATA
    try:
        model, preprocess = resolve_model(metadata["model"], metadata["preprocess"])
        prompts.eval_prompts(metadata["eval_prompts"])
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None
    for name in (PARAMS, ENCODE_QUERIES, EMBED_TOKENS):
        _check_hash(folder / name, metadata["sha256"].get(name))
    encode = _read_function(folder / ENCODE_QUERIES, *signatures(model)["encode_queries"])
    embed = _read_function(folder / EMBED_TOKENS, *signatures(model)["embed_tokens"])
    params = _read_params(folder / PARAMS, [encode, embed])

    def embed_image_tokens(params: Params, image: UInt8[Array, "b H W 3"]) -> TokenEmbeddings:
        return TokenEmbeddings(**cast(dict[str, Array], embed.call(params, image)))

    def embed_prompts(params: Params, tokens: Int32[Array, "t q l"]) -> Float[Array, "t q e"]:
        return cast(dict[str, Array], encode.call(params, tokens))["embeddings"]

    loaded = LoadedModel(
        params=params,
        config=model,
        preprocess=preprocess,
        eval_prompts=metadata["eval_prompts"],
        step=metadata["step"],
        tokenizer=_find_tokenizer(folder, metadata),
        names=tuple(metadata.get("names", [])),  # older exports have none
    )
    return loaded, DetectorFunctions(embed_prompts, embed_image_tokens, is_one_size=True)


def signatures(model: ModelConfig) -> dict[str, tuple[dict[str, Signature], dict[str, Signature]]]:
    """Inputs (after the parameters) and outputs of each function that is exported, by name."""
    side, e = model.image_size, model.embedding_dim
    n = (side // model.vit.patch_size) ** 2
    embeddings, image = (("t", "q", e), "float32"), (("b", side, side, 3), "uint8")
    return {
        "encode_queries": (
            {"tokens": (("t", "q", model.text.num_positions), "int32")},
            {"embeddings": embeddings},
        ),
        "embed_tokens": (
            {"image": image},
            {
                "boxes": (("b", n, 4), "float32"),
                "class_embeddings": (("b", n, e), "float32"),
                **dict.fromkeys(PER_TOKEN, (("b", n), "float32")),
            },
        ),
        "score_tokens": (
            {
                "image": image,
                "query_embeddings": embeddings,
                "is_query": (("q",), "bool"),
            },
            {
                "boxes_xyxy": (("b", n, 4), "float32"),
                "scores": (("b", n, "q"), "float32"),
                "class_embeddings": (("b", n, e), "float32"),
                "objectness_logits": (("b", n), "float32"),
            },
        ),
    }


def _read_metadata(folder: Path) -> dict[str, Any]:
    file = folder / METADATA
    try:
        if file.stat().st_size > MAX_METADATA_BYTES:
            raise ValueError(f"larger than {MAX_METADATA_BYTES} bytes")
        metadata = json.loads(files.read_text(file))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error})") from None
    if not isinstance(metadata, dict) or metadata.get("version") != VERSION:
        raise CheckpointError(f"{file}: not the metadata of an export of version {VERSION}")
    if metadata.get("format") != "stablehlo":
        raise CheckpointError(
            f"{file}: a {metadata.get('format')!r} export, which only its own runtime loads; write "
            "one with `owl-det export --format stablehlo`"
        )
    kinds = {"model": dict, "preprocess": dict, "tokenizer": dict, "sha256": dict}
    kinds |= {"eval_prompts": str, "step": int}
    for key, kind in kinds.items():
        if not isinstance(metadata.get(key), kind):
            raise CheckpointError(f"{file}: {key!r} is missing or no {kind.__name__}")
    names = metadata.get("names", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{file}: 'names' is no list of texts")
    return metadata


def _check_hash(file: Path, expected: Any) -> None:
    try:
        size = file.stat().st_size
        if file.suffix == ".jax_export" and size > MAX_FUNCTION_BYTES:
            raise CheckpointError(f"{file}: {size} bytes are too many for a function")
        actual = files.sha256(file)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from None
    if actual != expected:
        raise CheckpointError(
            f"{file}: damaged, or of another export (its SHA-256 is not the one in {METADATA}); "
            "export the checkpoint again"
        )


def _find_tokenizer(folder: Path, metadata: dict[str, Any]) -> str:
    """Path of the tokeniser's file; empty if there is none."""
    name = metadata["tokenizer"].get("file", "")
    if not name:
        return ""
    if name not in tokenizer.FILES.values():  # also no path that leads out of the folder
        raise CheckpointError(f"{folder / METADATA}: {name!r} is no tokeniser's file name")
    _check_hash(folder / name, metadata["sha256"].get(name))
    return str(folder / name)


def _read_function(
    file: Path, inputs: dict[str, Signature], outputs: dict[str, Signature]
) -> jax.export.Exported:
    try:
        function = jax.export.deserialize(bytearray(files.read_bytes(file)))
        native_call = NATIVE_CALL.search(function.mlir_module())
        (params, *taken), keywords = jax.tree.unflatten(function.in_tree, function.in_avals)
        made = jax.tree.unflatten(function.out_tree, function.out_avals)
        found = [_signature(aval) for aval in taken], {k: _signature(v) for k, v in made.items()}
    except Exception as error:  # flatbuffers and MLIR raise many kinds for bytes they cannot read
        raise CheckpointError(f"{file}: no function of jax.export ({error})") from error
    if native_call:
        raise CheckpointError(
            f"{file}: calls native code ({native_call.group()}), which no export of a detector does"
        )
    if found != (list(inputs.values()), outputs) or keywords or not isinstance(params, dict):
        raise CheckpointError(f"{file}: its inputs and outputs are not those of {METADATA}'s model")
    return function


def _signature(aval: Any) -> Signature:
    sizes = tuple(size if isinstance(size, int) else str(size) for size in aval.shape)
    return sizes, str(aval.dtype)


def _read_params(file: Path, functions: list[jax.export.Exported]) -> Params:
    """Reads the parameters, if they are those that all functions take."""
    try:
        with safetensors.safe_open(files.fetch(file), framework="numpy") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}
            saved = {n: (tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()}
            for function in functions:
                _check_params(file, saved, function)
            read = {name: tensors.get_tensor(name) for name in sorted(saved)}
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{file}: no safetensors file ({error})") from None
    params = path_rules.unflatten(read)
    finite.require_finite(params, str(file))
    return jax.device_put(params)


def _check_params(
    file: Path, saved: dict[str, tuple[tuple[int, ...], str]], function: jax.export.Exported
) -> None:
    (params, *_), _ = jax.tree.unflatten(function.in_tree, function.in_avals)
    try:
        wanted = {name: _signature(aval) for name, aval in path_rules.flatten(params).items()}
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {function.fun_name}: {error}") from None
    for name in sorted(wanted.keys() | saved.keys()):
        if saved.get(name) != (wanted.get(name, ((), ""))[0], "F32"):
            raise CheckpointError(
                f"{file}: {name} is {saved.get(name, 'missing')}; {function.fun_name} takes "
                f"{wanted.get(name, 'no such parameter')}"
            )
