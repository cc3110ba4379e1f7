"""All speed ratios of this project, each against the plain way of doing the same on the same machine.

    python benchmarks/run.py [--quick] [--only NAME ...]

Prints a table `name | ratio | target | met or SHORT | detail`; what each row compares is told in the
docstring of its file: stepping.py, scoring.py, qwen.py, qwen_gpu.py, trend_rl.py, preprocess.py,
preprocess_trend.py, reward_link.py, live_loop.py. A full run writes benchmarks/results/speed.json with the
facts of the machine; with --quick (short runs, noisy numbers) or --only nothing is written. There are no
absolute times, except in details of GPU rows and where a control loop has a limit (the last two): they would
say more of the machine than of the code. Leave the machine alone meanwhile.
"""

import argparse
import datetime
import importlib
import os
import platform
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.files import save_json  # noqa: E402
from common.runtime import run_script, versions  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "speed.json"
BENCHMARKS = {  # name -> module and function; each takes `quick` and returns rows
    "rl": ("stepping", "rl_rows"),
    "per_step": ("stepping", "per_step_rows"),
    "frame": ("stepping", "frame_rows"),
    "states": ("stepping", "states_rows"),
    "scoring": ("scoring", "rows"),
    "qwen": ("qwen", "rows"),
    "qwen_gpu": ("qwen_gpu", "rows"),  # none without a GPU
    "trend_rl": ("trend_rl", "rows"),
    "preprocess": ("preprocess", "rows"),
    "preprocess_trend": ("preprocess_trend", "rows"),
    "reward_link": ("reward_link", "rows"),
    "live_loop": ("live_loop", "rows"),
}


def measure(name: str, quick: bool) -> list[dict]:
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # ManiSkill's, with numpy 2.4
    module, function = BENCHMARKS[name]
    return getattr(importlib.import_module(f"benchmarks.{module}"), function)(quick)


def measure_in_fresh_process(name: str, quick: bool) -> list[dict]:
    """Each benchmark by itself: what one leaves in memory would count in the next one's peak, because the
    `ru_maxrss` of a child starts at its parent's. Nor does this process import torch, for the same reason."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        return executor.submit(measure, name, quick).result()


def is_met(row: dict) -> bool:
    """`unit` says which way: "x, at least", "MB, at most"."""
    at_least = row["unit"].endswith("at least")
    return row["ratio"] >= row["target"] if at_least else row["ratio"] <= row["target"]


def line(row: dict) -> str:
    unit, _, direction = row["unit"].rpartition("at ")
    target = f"{'>=' if direction == 'least' else '<='} {row['target']:g} {unit.rstrip(', ')}".rstrip()
    verdict = "met" if is_met(row) else "SHORT"
    return f"{row['name']} | {row['ratio']:.3g} | {target} | {verdict} | {row['detail']}"


def machine() -> dict:
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    models = [text.partition(":")[2].strip() for text in lines if text.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(os.getloadavg()[0], 2),  # 1-minute average: above 0.5 others were at work
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the speed ratios of this project.")
    parser.add_argument(
        "--quick", action="store_true", help="short runs, one pair each: does it work at all?"
    )
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, metavar="NAME", help=", ".join(BENCHMARKS))
    args = parser.parse_args()
    facts = machine()
    rows = []
    print("name | ratio | target | met | detail")
    for name in args.only or BENCHMARKS:
        for row in measure_in_fresh_process(name, args.quick):
            print(line(row), flush=True)
            rows.append({**row, "met": is_met(row)})
    if not args.quick and not args.only:
        RESULTS.parent.mkdir(exist_ok=True)
        save_json({"machine": facts, "rows": rows}, RESULTS)
        print(f"written to {RESULTS.relative_to(ROOT)}")


if __name__ == "__main__":
    run_script(main)
