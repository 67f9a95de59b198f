"""The model of the step time: its arithmetic and its command."""

import pytest

from benchmarks import collectives, step_time
from owl_det.sharding import AXES
from owl_det.training import flops


def _config(sizes: list[int]):
    return collectives.load_config("owlv2_b16", sizes, 64, 256)


def test_compute_is_flops_over_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    # Devices stand for themselves: those of the test process are set already.
    monkeypatch.setattr(step_time.collectives, "devices_of", lambda _, n: list(range(n)))
    hardware = step_time.Hardware(
        peak_flops=1e12, near_bandwidth=1e9, far_bandwidth=1e8, group_size=4
    )
    monkeypatch.setattr(
        step_time.collectives,
        "minimum",
        lambda *_: {
            "data": {"all-reduce": 1e8},
            "fsdp": {"all-gather": 2e8, "reduce-scatter": 1e8},
        },
    )
    sizes = [2, 4, 1]
    assert AXES == ("data", "fsdp", "tensor")
    config = _config(sizes)
    found = step_time.step_seconds(config, hardware, sizes, mfu=0.5)
    # Eight shards with 256 texts each, for 64 images.
    needed = flops.flops_per_image(config, 32.0) * 64
    assert found["compute"] == pytest.approx(needed / (8 * 1e12 * 0.5))
    assert found["traffic_fsdp"] == pytest.approx(0.3)  # the four lie together
    assert found["traffic_data"] == pytest.approx(1.0)  # these do not
    assert found["at_least"] == max(found["compute"], found["traffic_fsdp"] + found["traffic_data"])
    assert found["at_most"] == pytest.approx(found["compute"] + 1.3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mfu", "0"], "--mfu: in (0, 1], got 0.0"),
        (["--mesh", "8"], "--mesh: three sizes"),
        (["--config", "absent"], "--config: absent: no such file"),
    ],
)
def test_bad_arguments_are_one_line(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert step_time.main(flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
