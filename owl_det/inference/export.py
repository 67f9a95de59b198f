"""Exports: a checkpoint as StableHLO, TensorFlow SavedModel or ONNX, checked after writing.

All three hold two functions (`FUNCTIONS`, `stablehlo.signatures`) with symbolic numbers of images,
prompts and queries, and `export.json` beside them. The best pairs are chosen by the caller, so that
`top_k` and thresholds stay free.
"""

import dataclasses
import json
import logging
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax.extend.core import jaxpr_as_fun
from jaxtyping import Array

import owl_det
from data_pipelines import prompts, tokenizer
from owl_det import boxes as box_lib
from owl_det import files, path_rules
from owl_det.checkpoints import identity
from owl_det.checkpoints.load import load_detector
from owl_det.errors import CheckpointError, UserError
from owl_det.inference import ranking, stablehlo
from owl_det.inference.export_folder import METADATA, is_export
from owl_det.inference.ranking import DetectorFunctions
from owl_det.optional import installation, is_installed, leave_accelerators_to_jax
from owl_det.types import LoadedModel, Params

# Of embeddings, boxes (relative), scores and logits. Float32 runtimes differ by 1e-6 to 1e-5.
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.1}
SAMPLE_QUERIES = ("a cat", "two red circles", "photo")

Outputs: TypeAlias = dict[str, np.ndarray]
# StableHLO is run by `Predictor`, which ranks queries itself; the users of the others get scores.
FUNCTIONS = {
    "stablehlo": ("encode_queries", "embed_tokens"),
    "saved_model": ("encode_queries", "score_tokens"),
    "onnx": ("encode_queries", "score_tokens"),
}

# A runtime runs both functions of what was written, on inputs by name.
Runtime: TypeAlias = Callable[[Outputs], Outputs]


def export(
    source: str | os.PathLike[str], target: str | os.PathLike[str], kind: str = "stablehlo"
) -> dict[str, Any]:
    """Writes a checkpoint as `kind` ("stablehlo", "saved_model" or "onnx") to a new folder.

    Returns what was written: files and their bytes, and the largest absolute difference of each
    output between the checkpoint and the files as loaded again, on random images. Raises
    `CheckpointError` if the source is none or the target is not empty, and `UserError` if a
    package is missing or the written model computes something else.
    """
    folder = Path(target)
    if is_export(source):
        raise CheckpointError(f"{source}: is an export already; give the checkpoint it came from")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: exists and is not empty; choose another folder")
    model = _portable(load_detector(source), kind)
    start = time.perf_counter()
    with files.atomic_folder(folder) as scratch:
        runtime = WRITERS[kind](scratch, model)
        _write_metadata(scratch, model, kind)
        differences = _check(model, runtime, kind)
        _publish(scratch)
    return {
        "format": kind,
        "path": str(folder),
        "seconds": round(time.perf_counter() - start, 1),
        "bytes": {str(path.relative_to(folder)): path.stat().st_size for path in _files_in(folder)},
        "max_abs_difference": differences,
    }


def _files_in(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def _publish(folder: Path) -> None:
    """Lets others read what some of the writers keep private."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _portable(model: LoadedModel, kind: str) -> LoadedModel:
    """The model without what ties it to training or to one kind of accelerator."""
    changes: dict[str, Any] = {"attention": "portable", "remat": "none", "scan_unroll": 1}
    if kind == "onnx":
        changes["attention"] = "plain"  # ONNX has no choice of platform
        changes["dtype"] = "float32"  # ONNX runtimes have few bfloat16 kernels
    return dataclasses.replace(model, config=dataclasses.replace(model.config, **changes))


def _write_stablehlo(folder: Path, model: LoadedModel) -> Runtime:
    flat = {k: np.asarray(v) for k, v in path_rules.flatten(model.params).items()}
    safetensors.numpy.save_file(flat, folder / stablehlo.PARAMS)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model.params)
    for name, function in _named(DetectorFunctions.of_model(model), model, "stablehlo").items():
        exported = jax.export.export(jax.jit(function), platforms=stablehlo.PLATFORMS)(
            params, *_symbolic_inputs(model, name)
        )
        files.write_atomic(folder / f"{name}.jax_export", bytes(exported.serialize()))

    def run(inputs: Outputs) -> Outputs:
        loaded, functions = stablehlo.load(folder)
        return _run(functions, loaded, inputs, "stablehlo")

    return run


def _write_saved_model(folder: Path, model: LoadedModel) -> Runtime:
    _require("tensorflow", "SavedModel", "pip install tensorflow-cpu")
    import tensorflow as tf
    from jax.experimental import jax2tf

    leave_accelerators_to_jax()
    module, variables = tf.Module(), jax.tree.map(tf.Variable, jax.device_get(model.params))
    module.params = variables  # pyright: ignore[reportAttributeAccessIssue]  # so that it saves them
    signatures = {}
    for name, function in _named(DetectorFunctions.of_model(model), model, "saved_model").items():
        inputs, _ = stablehlo.signatures(model.config)[name]
        converted = jax2tf.convert(
            function,
            polymorphic_shapes=[None, *(f"({', '.join(map(str, s))})" for s, _ in inputs.values())],
            native_serialization_platforms=stablehlo.PLATFORMS,
            with_gradient=False,
        )
        specs = [
            tf.TensorSpec([size if isinstance(size, int) else None for size in sizes], dtype, key)
            for key, (sizes, dtype) in inputs.items()
        ]
        signatures[name] = tf.function(
            partial(converted, variables), input_signature=specs, autograph=False
        )
    tf.saved_model.save(module, str(folder), signatures=signatures)

    def run(inputs: Outputs) -> Outputs:
        loaded = tf.saved_model.load(str(folder)).signatures
        outputs: Outputs = {}
        for name in FUNCTIONS["saved_model"]:
            keys, _ = stablehlo.signatures(model.config)[name]
            made = loaded[name](**{key: tf.constant(inputs[key]) for key in keys})
            outputs |= {key: value.numpy() for key, value in made.items()}
        return outputs

    return run


def _write_onnx(folder: Path, model: LoadedModel) -> Runtime:
    for package in ("jax2onnx", "onnxruntime"):
        _require(package, "ONNX", installation("onnx"))
    import jax2onnx  # pyright: ignore[reportMissingImports]  # extra onnx
    import onnx  # pyright: ignore[reportMissingImports]
    import onnxruntime  # pyright: ignore[reportMissingImports]

    # Names every intermediate value of unknown shape; onnxruntime infers those itself.
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)
    for name, function in _named(DetectorFunctions.of_model(model), model, "onnx").items():
        symbolic = _symbolic_inputs(model, name)
        inputs, outputs = stablehlo.signatures(model.config)[name]
        # jax2onnx replaces parts of jax.numpy while it traces, which Flax's scan does not survive;
        # so it is given the jaxpr, traced beforehand. Results are in the order of the dict's keys.
        jaxpr = jax.make_jaxpr(partial(function, model.params))(*symbolic)
        proto = jax2onnx.to_onnx(
            jaxpr_as_fun(jaxpr),
            symbolic,
            model_name=name,
            input_names=list(inputs),
            output_names=sorted(outputs),
        )
        _replace_boolean_where(proto.graph)
        proto = _without_leftovers(proto)
        # Parameters in a file of their own: a protobuf ends at 2 GiB.
        onnx.save_model(
            proto,
            folder / f"{name}.onnx",
            save_as_external_data=True,
            location=f"{name}.onnx.data",
        )

    def run(inputs: Outputs) -> Outputs:
        outputs: Outputs = {}
        for name in FUNCTIONS["onnx"]:
            keys, made = stablehlo.signatures(model.config)[name]
            session = onnxruntime.InferenceSession(
                folder / f"{name}.onnx", providers=["CPUExecutionProvider"]
            )
            values = session.run(list(made), {key: inputs[key] for key in keys})
            outputs |= dict(zip(made, values, strict=True))
        return outputs

    return run


def _replace_boolean_where(graph: Any) -> None:
    """Where(c, x, y) of booleans → (c ∧ x) ∨ (¬c ∧ y), in place: onnxruntime has no such Where.

    The causal mask of the text tower needs it.
    """
    import onnx  # pyright: ignore[reportMissingImports]  # extra onnx
    import onnx.helper  # pyright: ignore[reportMissingImports]

    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.output)}
    nodes = []
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _replace_boolean_where(attribute.g)
        if node.op_type != "Where" or types.get(node.output[0]) != onnx.TensorProto.BOOL:
            nodes.append(node)
            continue
        (condition, x, y), (out,) = node.input, node.output
        nodes += [
            onnx.helper.make_node("Not", [condition], [f"{out}/not"]),
            onnx.helper.make_node("And", [condition, x], [f"{out}/x"]),
            onnx.helper.make_node("And", [f"{out}/not", y], [f"{out}/y"]),
            onnx.helper.make_node("Or", [f"{out}/x", f"{out}/y"], [out]),
        ]
    del graph.node[:]
    graph.node.extend(nodes)


def _without_leftovers(proto: Any) -> Any:
    """The model without constants that no node uses; ONNX Runtime warns of each at every load.

    jax2onnx leaves most of them in the bodies of loops, where only lifting them makes them found.
    """
    import onnx_ir  # pyright: ignore[reportMissingImports]  # jax2onnx needs it
    from onnx_ir.passes import common  # pyright: ignore[reportMissingImports]

    model = onnx_ir.from_proto(proto)
    lift, remove = common.LiftSubgraphInitializersToMainGraphPass(), common.RemoveUnusedNodesPass()
    return onnx_ir.to_proto(onnx_ir.passes.Sequential(lift, remove)(model).model)


WRITERS: dict[str, Callable[[Path, LoadedModel], Runtime]] = {
    "stablehlo": _write_stablehlo,
    "saved_model": _write_saved_model,
    "onnx": _write_onnx,
}


def _named(
    functions: DetectorFunctions, model: LoadedModel, kind: str
) -> dict[str, Callable[..., dict[str, Array]]]:
    """The functions of a format, outputs by name as `stablehlo.signatures` lists them."""

    def encode_queries(params: Params, tokens: Array) -> dict[str, Array]:
        embeddings = functions.embed_prompts(params, tokens)
        return {"embeddings": embeddings.astype(jnp.float32)}  # whatever the model computes in

    def embed_tokens(params: Params, image: Array) -> dict[str, Array]:
        tokens = functions.embed_image_tokens(params, image)
        return {field.name: getattr(tokens, field.name) for field in dataclasses.fields(tokens)}

    def score_tokens(
        params: Params, image: Array, query_embeddings: Array, is_query: Array
    ) -> dict[str, Array]:
        tokens = functions.embed_image_tokens(params, image)
        scores = ranking.score(tokens, query_embeddings, jnp.dtype(model.config.dtype))
        return {
            "boxes_xyxy": box_lib.cxcywh_to_xyxy(tokens.boxes),
            "scores": jnp.where(is_query[None, None, :], scores, 0.0),
            "class_embeddings": tokens.class_embeddings,
            "objectness_logits": tokens.objectness_logits,
        }

    every = (encode_queries, embed_tokens, score_tokens)
    return {f.__name__: f for f in every if f.__name__ in FUNCTIONS[kind]}


def _symbolic_inputs(model: LoadedModel, name: str) -> list[jax.ShapeDtypeStruct]:
    inputs, _ = stablehlo.signatures(model.config)[name]
    scope = jax.export.SymbolicScope()
    return [
        jax.ShapeDtypeStruct(
            jax.export.symbolic_shape(", ".join(map(str, sizes)), scope=scope), dtype
        )
        for sizes, dtype in inputs.values()
    ]


def _require(package: str, what: str, install: str) -> None:
    if not is_installed(package):
        raise UserError(f"{what} needs {package}, which is not installed: {install}")


def _write_metadata(folder: Path, model: LoadedModel, kind: str) -> None:
    if model.tokenizer:
        content = files.read_bytes(model.tokenizer)
        files.write_atomic(folder / Path(model.tokenizer).name, content)
    metadata = {
        "version": stablehlo.VERSION,
        "format": kind,
        "step": model.step,
        "fingerprint": identity.model_hash(model),
        "model": dataclasses.asdict(model.config),
        "preprocess": dataclasses.asdict(model.preprocess),
        "eval_prompts": model.eval_prompts,
        "names": model.names,
        "prompt_templates": prompts.eval_prompts(model.eval_prompts),
        "tokenizer": {
            "kind": model.config.text.tokenizer,
            "num_positions": model.config.text.num_positions,
            "file": Path(model.tokenizer).name,  # empty = CLIP's vocabulary
        },
        "functions": {name: stablehlo.signatures(model.config)[name] for name in FUNCTIONS[kind]},
        "platforms": stablehlo.PLATFORMS if kind != "onnx" else None,
        "sha256": {str(path.relative_to(folder)): files.sha256(path) for path in _files_in(folder)},
        "written_with": {"owl_det": owl_det.__version__, "jax": jax.__version__},
    }
    files.write_atomic(folder / METADATA, json.dumps(metadata, indent=2) + "\n")


def _check(model: LoadedModel, runtime: Runtime, kind: str) -> dict[str, float]:
    """The largest absolute difference of each output. Raises `UserError` beyond the tolerance."""
    inputs = _sample(model)
    # StableHLO runs here as the checkpoint does; the others run in full precision on the CPU.
    with jax.default_matmul_precision("default" if kind == "stablehlo" else "highest"):
        expected = _run(DetectorFunctions.of_model(model), model, inputs, kind)
    actual = runtime(inputs)
    differences = {
        name: float(np.abs(value.astype(np.float32) - actual[name].astype(np.float32)).max())
        for name, value in expected.items()
    }
    tolerance = TOLERANCES[model.config.dtype]
    for name, difference in differences.items():
        if not difference <= tolerance:
            raise UserError(
                f"the written model differs from the checkpoint: {name} by {difference:.3g}, where "
                f"{tolerance} is allowed; nothing was written"
            )
    return differences


def _sample(model: LoadedModel) -> Outputs:
    """Random images, and texts in two prompts; the last query is a filler."""
    rng = np.random.default_rng(0)
    side, e = model.config.image_size, model.config.embedding_dim
    tokens = tokenizer.build(model.config.text, model.tokenizer).encode_all(SAMPLE_QUERIES)
    return {
        "tokens": np.stack([tokens, tokens[::-1]]),
        "image": rng.integers(0, 256, (2, side, side, 3), np.uint8),
        "query_embeddings": rng.normal(size=(2, 3, e)).astype(np.float32),
        "is_query": np.array([True, True, False]),
    }


def _run(functions: DetectorFunctions, model: LoadedModel, inputs: Outputs, kind: str) -> Outputs:
    outputs: dict[str, Array] = {}
    for name, function in _named(functions, model, kind).items():
        keys, _ = stablehlo.signatures(model.config)[name]
        outputs |= jax.jit(function)(model.params, *(inputs[key] for key in keys))
    return jax.device_get(outputs)
