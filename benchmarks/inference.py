"""Times our detector against transformers' with the same random weights; prints JSON.

    python -m benchmarks.inference --models b16 b32 --threads 1
    python -m benchmarks.inference --models b32 --task gradient --peers owl_det sdpa
    python -m benchmarks.inference --models b16 --device cuda --dtype bfloat16 --attention cudnn \
        --batch_size 16 --peers owl_det sdpa compile

`--batch_size` images and `--queries` texts of each: both towers and the heads, parameters in
float32. `gradient` is a training step without the optimiser: forward and backward of the mean
square of all outputs, with respect to all parameters. Each peer runs in a process of its own, on
the first `--threads` cores that this one may use, and their outputs are compared. Needs the extra
[parity], and a C++ compiler for `compile`.

Seconds are of the clock and of the processors (`cpu`); where other work shares the cores only the
latter compare. `running_bytes` is the most that the process held (resident; on a GPU: in arrays)
while it ran, models included; `process_bytes` also while it loaded and compiled. What loading and
compiling have freed goes back to the system before, for every peer (`training.memory`, as in
training).
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import command
from owl_det.errors import ConfigError
from owl_det.training import memory

# Kind, side of the image and of a patch in pixels.
MODELS = {"b16": ("owlv2", 960, 16), "b32": ("owlvit", 768, 32), "tiny": ("owlv2", 160, 16)}
PEERS = ("owl_det", "eager", "sdpa", "compile")  # all but the first are transformers'
OUTPUTS = ("class_logits", "boxes", "objectness_logits")

Outputs = dict[str, np.ndarray]
_PLACES = ("device", "dtype", "attention", "batch_size")


# --- the two programs ----------------------------------------------------------------------------


def prepare_ours(
    arguments: argparse.Namespace, pixels: np.ndarray, tokens: np.ndarray
) -> Callable[[], Outputs]:
    """A call of our detector, compiled."""
    import jax
    import jax.numpy as jnp

    from owl_det.convert import huggingface
    from owl_det.modeling import build

    size = arguments.batch_size
    model = huggingface.read(arguments.folder)
    settings: Any = dataclasses.replace(
        model.config,
        remat=arguments.remat,
        dtype=arguments.dtype,
        attention=arguments.attention,
    )
    detector = build.detector_of(settings, model.preprocess)
    image, ids = (np.repeat(x[None], size, axis=0) for x in (pixels, tokens))
    is_query = jnp.ones((size, len(tokens)), bool)

    def forward(params: Any, image: jax.Array) -> dict[str, jax.Array]:
        b, q, length = ids.shape
        queries = build.call(detector.encode_text, params, jnp.asarray(ids.reshape(b * q, length)))
        features = build.call(detector.encode_image, params, image)
        found = build.call(detector.predict, params, features, queries.reshape(b, q, -1), is_query)
        return {name: getattr(found, name) for name in OUTPUTS}

    def loss(params: Any, image: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        outputs = forward(params, image)
        return sum((jnp.mean(x**2) for x in outputs.values()), jnp.zeros(())), outputs

    gradient: Any = jax.grad(loss, has_aux=True)
    params, image = jax.device_put((model.params, image))
    del model
    function = jax.jit(forward if arguments.task == "forward" else gradient)
    compiled = function.lower(params, image).compile()

    def call() -> Outputs:
        found = jax.block_until_ready(compiled(params, image))
        outputs = found if arguments.task == "forward" else found[1]
        return {name: np.asarray(x, np.float32) for name, x in outputs.items()}

    return call


def prepare_theirs(
    arguments: argparse.Namespace, pixels: np.ndarray, tokens: np.ndarray
) -> Callable[[], Outputs]:
    """A call of transformers' model: `eager` or `sdpa` attention, or sdpa through torch.compile.

    bfloat16 is by autocast: parameters stay in float32, as ours do.
    """
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(arguments.threads)
    folder, peer, size = arguments.folder, arguments.one, arguments.batch_size
    settings: Any = transformers.AutoConfig.from_pretrained(folder)
    model: Any = getattr(transformers, settings.architectures[0]).from_pretrained(
        folder, attn_implementation="eager" if peer == "eager" else "sdpa"
    )
    model.eval().to(arguments.device)
    preprocess = json.loads((Path(folder) / "preprocessor_config.json").read_text())
    normal = (pixels / 255 - preprocess["image_mean"]) / preprocess["image_std"]
    is_token = np.arange(tokens.shape[1]) <= tokens.argmax(-1)[:, None]
    inputs = {
        "pixel_values": np.repeat(normal.astype(np.float32).transpose(2, 0, 1)[None], size, axis=0),
        "input_ids": np.tile(tokens.astype(np.int64), (size, 1)),
        "attention_mask": np.tile(is_token.astype(np.int64), (size, 1)),
    }
    inputs = {key: torch.tensor(value, device=arguments.device) for key, value in inputs.items()}
    function = torch.compile(model) if peer == "compile" else model

    def run() -> dict[str, Any]:
        is_half = arguments.dtype == "bfloat16"
        with torch.autocast(arguments.device, torch.bfloat16, enabled=is_half):
            found = function(**inputs)
        outputs = {"class_logits": found.logits, "boxes": found.pred_boxes}
        objectness = getattr(found, "objectness_logits", None)
        if objectness is None:  # OWL-ViT has none, and ours is 0 there
            objectness = torch.zeros(outputs["boxes"].shape[:2], device=arguments.device)
        return {**outputs, "objectness_logits": objectness}

    def call() -> Outputs:
        if arguments.task == "forward":
            with torch.inference_mode():
                return to_host(run())
        model.zero_grad(set_to_none=True)
        outputs = run()
        torch.stack([(x.float() ** 2).mean() for x in outputs.values()]).sum().backward()
        return to_host(outputs)

    def to_host(outputs: dict[str, Any]) -> Outputs:
        return {name: x.detach().float().cpu().numpy() for name, x in outputs.items()}

    return call


# --- one process a peer --------------------------------------------------------------------------


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs one peer in this process and saves its outputs beside the model."""
    peer, folder = arguments.one, arguments.folder
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    pixels, tokens = inputs_of(folder, arguments.queries)
    started = time.perf_counter()
    prepare = prepare_ours if peer == "owl_det" else prepare_theirs
    call = prepare(arguments, pixels, tokens)
    outputs = call()  # compiles, and warms caches
    preparing = time.perf_counter() - started
    loading_bytes = peak_resident()
    memory.give_back_freed()
    reset_peak()
    wall, cpu = [], []
    for _ in range(arguments.repeats):
        starts = time.perf_counter(), time.process_time()
        call()
        wall.append(time.perf_counter() - starts[0])
        cpu.append(time.process_time() - starts[1])
    np.savez(Path(folder) / f"{peer}.npz", **outputs)  # pyright: ignore[reportArgumentType]
    running_bytes = peak_resident()
    process_bytes = max(loading_bytes, running_bytes)
    if arguments.device != "cpu":
        running_bytes = device_peak(peer)
    return {
        "wall_seconds": command.spread(wall),
        "cpu_seconds": command.spread(cpu),
        "prepare_seconds": preparing,
        "running_bytes": running_bytes,
        "process_bytes": process_bytes,
    }


def device_peak(peer: str) -> int:
    """The most bytes of the GPU that this process has held in arrays."""
    if peer == "owl_det":
        import jax

        return (jax.devices()[0].memory_stats() or {})["peak_bytes_in_use"]
    import torch  # pyright: ignore[reportMissingImports]

    return torch.cuda.max_memory_allocated()


def inputs_of(folder: str, queries: int) -> tuple[np.ndarray, np.ndarray]:
    """A noise image of the model's size and the tokens of as many texts."""
    from data_pipelines.tokenizer import ClipTokenizer

    described = json.loads((Path(folder) / "config.json").read_text())
    side = described["vision_config"]["image_size"]
    pixels = np.random.default_rng(1).integers(0, 256, (side, side, 3), np.uint8)
    length = described["text_config"].get("max_position_embeddings", 16)
    return pixels, ClipTokenizer(length).encode_all([f"a photo of {i}" for i in range(queries)])


def reset_peak() -> None:
    """From here on `peak_resident` tells the peak. Linux only."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_resident() -> int:
    """The most bytes that this process has held (resident) since the last reset. Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


# --- command -------------------------------------------------------------------------------------


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All peers of all models, one process after the other."""
    counts = (arguments.threads, arguments.repeats, arguments.queries, arguments.batch_size)
    if min(counts) < 1:
        raise ConfigError("--threads, --repeats, --queries and --batch_size: must be positive")
    command.require("parity", "torch", "transformers")
    if arguments.threads > len(os.sched_getaffinity(0)):
        raise ConfigError(
            f"--threads: {arguments.threads} asked for, {len(os.sched_getaffinity(0))} cores here"
        )
    # This process looks at the device too, and must leave its memory to the peers.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if arguments.device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    machine = _machine()
    if arguments.device == "cuda":
        _check_gpu(machine["platform"], arguments.peers)
    return {
        "machine": machine,
        "task": arguments.task,
        **{key: getattr(arguments, key) for key in _PLACES},
        "threads": arguments.threads,
        "queries": arguments.queries,
        "repeats": arguments.repeats,
        "remat": arguments.remat,
        "load_average_before": os.getloadavg()[0],
        "models": {name: compare(name, arguments) for name in arguments.models},
    }


def _check_gpu(platform: str, peers: Sequence[str]) -> None:
    """Raises `ConfigError` if JAX or PyTorch is to use a GPU and finds none."""
    import torch  # pyright: ignore[reportMissingImports]

    if "owl_det" in peers and platform == "cpu":
        raise ConfigError("--device cuda: JAX finds no GPU here; leave it out for the CPU")
    if set(peers) - {"owl_det"} and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch finds no GPU here; leave it out for the CPU")


def compare(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The peers on one model: measurements, ratios to ours, differences of the outputs."""
    from benchmarks.parity import save_random

    kind, side, patch = MODELS[name]
    with tempfile.TemporaryDirectory() as folder:
        save_random(Path(folder), kind, side, patch)
        found = {peer: _in_own_process(peer, folder, arguments) for peer in arguments.peers}
        outputs = {peer: dict(np.load(Path(folder) / f"{peer}.npz")) for peer in arguments.peers}
    result: dict[str, Any] = {"image_size": side, "patch_size": patch, "peers": found}
    if "owl_det" not in found:
        return result
    ours = found["owl_det"]
    result["theirs_over_ours"] = {
        peer: {
            "wall": entry["wall_seconds"]["median"] / ours["wall_seconds"]["median"],
            "cpu": entry["cpu_seconds"]["median"] / ours["cpu_seconds"]["median"],
            "running_bytes": entry["running_bytes"] / ours["running_bytes"],
            "max_abs_difference": {
                key: float(np.abs(outputs[peer][key] - outputs["owl_det"][key]).max())
                for key in OUTPUTS
            },
        }
        for peer, entry in found.items()
        if peer != "owl_det"
    }
    return result


def _in_own_process(peer: str, folder: str, arguments: argparse.Namespace) -> dict[str, Any]:
    call = [sys.executable, "-m", "benchmarks.inference", "--one", peer, "--folder", folder]
    for key in ("task", "threads", "queries", "repeats", "remat", *_PLACES):
        call += [f"--{key}", str(getattr(arguments, key))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    done = subprocess.run(call, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"--peers: {peer} cannot run here: {command.reason(done)}")
    return json.loads(done.stdout.splitlines()[-1])


def _machine() -> dict[str, Any]:
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    return {
        **command.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command.parser(__doc__)
    parser.add_argument(
        "--models", nargs="+", choices=sorted(MODELS), default=["b16", "b32"], help="sizes"
    )
    parser.add_argument(
        "--peers", nargs="+", choices=PEERS, default=list(PEERS), help="what is timed"
    )
    parser.add_argument(
        "--task", choices=("forward", "gradient"), default="forward", help="what is computed"
    )
    parser.add_argument("--threads", type=int, default=1, help="processor cores of each peer")
    parser.add_argument("--queries", type=int, default=10, help="texts")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each peer")
    parser.add_argument(
        "--remat", choices=("none", "full", "dots"), default="dots", help="of ours, for gradients"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of all peers")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of matrix work"
    )
    parser.add_argument("--attention", choices=("xla", "cudnn"), default="xla", help="ours")
    parser.add_argument("--batch_size", type=int, default=1, help="images, each with its own texts")
    command.add_out(parser)
    parser.add_argument("--one", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the measurements. Returns 2, with one line on stderr, for arguments of no use."""
    arguments = _parse(argv)
    if arguments.one:
        return command.exit_code("inference", lambda: print(json.dumps(measure(arguments))))
    return command.report("inference", lambda: run(arguments), arguments.out)


if __name__ == "__main__":
    sys.exit(main())
