"""The real-world workflow without a robot: what `make demo-real` runs.

    python benchmarks/demo_real.py

A simulated Franka, and an operator made of code that drives it by a SpaceMouse's raw reports and labels by
keys through a pseudo-terminal (`common/scripted_operator.py`): label frames, train a classifier on them, then
drive elsewhere and hold its verdicts against the marks. Runs the plain commands of the workflow, each printed
before it runs, and collects their numbers in `logs/demo_real/summary.json`. An earlier `logs/demo_real` is
moved aside. With `devices.operator=human` after the first and the last command, you are the operator.
"""

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.demo import move_aside, run_stage  # noqa: E402  the checkout is not installed
from common.files import load_json, save_json  # noqa: E402
from common.runtime import run_script, versions  # noqa: E402

FOLDER = "logs/demo_real"  # the folder that the configs name


def stages(seed: int) -> dict[str, list[str]]:
    """Name -> plain command."""
    seeds = (seed, seed, 1000 + seed)
    scripts = ("collect", "resnet", "teleop")
    seeded = {name: [f"runner.seed={n}"] if seed else [] for name, n in zip(scripts, seeds, strict=True)}
    return {
        "label frames": ["collect.py", "configs/demo_real_collect.yaml", *seeded["collect"]],
        "train": ["train_resnet.py", "configs/demo_real_resnet.yaml", *seeded["resnet"]],
        "judge live": ["teleop_eval.py", "configs/demo_real_teleop.yaml", *seeded["teleop"]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of every stage (default 0)")
    seed = parser.parse_args().seed
    move_aside(ROOT / FOLDER)
    start = time.perf_counter()
    seconds = {name: run_stage(command) for name, command in stages(seed).items()}
    seconds["all"] = round(time.perf_counter() - start, 1)
    collect, resnet, teleop = (
        load_json(ROOT / FOLDER / stage / "summary.json") for stage in ("collect", "resnet", "teleop")
    )
    summary = {
        "seed": seed,
        "labelled": {name: collect[name] for name in ("num_success_frames", "num_fail_frames")},
        "val_metrics": resnet["val_metrics"],
        "live": teleop,
        "seconds": seconds,
        "versions": versions(),
    }
    save_json(summary, ROOT / FOLDER / "summary.json")
    print(f"\n{'stage':<14}{'seconds':>9}")
    for name, value in seconds.items():
        print(f"{name:<14}{value:>9}")
    numbers = ("precision", "recall", "lag_s", "flicker_per_min", "late_share")
    told = ", ".join(f"{name} {teleop[name]:.3g}" for name in numbers if teleop[name] is not None)
    print(f"\nlive, against the operator's marks: {told}")
    print(f"look at {FOLDER}/teleop/traces.html in a browser, and at scores.png, teleop.log beside it")


if __name__ == "__main__":
    run_script(main)
