"""preprocess_qwentrend.py against the least that the job takes: load each pickle once, dump each window.

    python benchmarks/preprocess_trend.py [--quick]

Episodes as in preprocess.py, 60 of them (0.3 GB; quick: 20), with the options' defaults: windows of 5 frames,
stride 1, positive ones reversed as well, labels balanced; 0.9 GB is written. The plain side is told which
windows to write and their rows of segments.jsonl, checks nothing and writes in place. Time and memory are
taken as in preprocess.py, but in RAM (/dev/shm, where there is one): ours waits until its files are on the
disk, and a disk's speed is not ours. The detail tells the ratio on a disk, where the plain side waits too.
"""

import argparse
import json
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.preprocess import make_episodes, run_once  # noqa: E402

MEMORY = Path("/dev/shm")
OPTIONS = ["--raw-data-path", "episodes", "--output-dir", "ours"]
OPTIONS += ["--window-size", "5", "--stride", "1", "--delta-threshold", "0.05"]

OURS = f"""
import sys, time
import preprocess_qwentrend
start = time.perf_counter()
sys.argv = ["preprocess_qwentrend.py", "--overwrite", *{OPTIONS}]
preprocess_qwentrend.main()
"""

PLAIN = """
import json, os, pickle, sys, time
import numpy
chosen = json.load(open("chosen.json"))
start = time.perf_counter()
segments = {}
for split in ("train", "eval"):
    os.makedirs(f"plain/{split}/pkl", exist_ok=True)
    segments[split] = open(f"plain/{split}/segments.jsonl", "w")
for path, windows in chosen.items():
    with open(path, "rb") as file:
        observations = pickle.load(file)["observations"]
    for split, row, times in windows:
        sample = {
            "main_frames": [observations[t]["main_images"] for t in times],
            "extra_view_frames": [observations[t]["extra_view_images"][0] for t in times],
            "label": row["answer"],
            "score": row["supervision"]["score"],
        }
        with open("plain/" + row["pkl_path"], "wb") as file:
            pickle.dump(sample, file)
        segments[split].write(json.dumps(row) + "\\n")
for file in segments.values():
    file.close()
"""


def choose(folder: Path) -> None:
    """chosen.json: episode -> [split, row, times] of the windows that our side writes, for the plain side."""
    import preprocess_qwentrend as script
    from common.episodes import list_episodes
    from common.preprocessing import survey

    args = script.parse_args([*OPTIONS, "--output-dir", str(folder / "x")])
    args.raw_data_path = folder / "episodes"
    read = partial(script.read_outline, source=args.score, task_description=None)
    outlines, _ = survey(read, list_episodes(args.raw_data_path), False, 1)
    _, chosen, _ = script.choose_windows(outlines, args)
    windows = {}
    for job in script.list_jobs(outlines, chosen):
        rows = (script.describe_window(job, number, args) for number in range(len(job.windows)))
        windows[str(job.outline.path)] = [(job.split, row, times.tolist()) for row, times in rows]
    (folder / "chosen.json").write_text(json.dumps(windows))


def measure(parent: Path | None, num_episodes: int, num_runs: int, plain_code: str) -> tuple[list, list, int]:
    """([(seconds, peak MB, _)] of ours, of the plain side, number of windows) in a folder under `parent`
    (None: where temporary files go)."""
    with tempfile.TemporaryDirectory(dir=parent) as name:
        folder = Path(name)
        make_episodes(folder / "episodes", num_episodes)
        choose(folder)
        ours, plain = [], []
        for _ in range(num_runs):
            ours.append(run_once(OURS, folder))
            plain.append(run_once(plain_code, folder))
        names = {side: {path.name for path in (folder / side).rglob("*.pkl")} for side in ("ours", "plain")}
        assert names["ours"] == names["plain"], "the sides wrote different windows"
    return ours[1:], plain[1:], len(names["ours"])


def rows(quick: bool) -> list[dict]:
    """Rows for benchmarks/run.py: time as a ratio to the plain side, peak memory in MB."""
    in_ram = MEMORY if MEMORY.is_dir() else None
    ours, plain, num_windows = measure(in_ram, 20 if quick else 60, 2 if quick else 6, PLAIN)
    on_disk = measure(None, 20, 2 if quick else 4, PLAIN + "os.sync()\n")
    ours_s, plain_s, ours_disk_s, plain_disk_s = (
        statistics.median(run[0] for run in runs) for runs in (ours, plain, *on_disk[:2])
    )
    ours_mb, plain_mb = (statistics.median(run[1] for run in runs) for runs in (ours, plain))
    return [
        {
            "name": "preprocess_qwentrend: time against pickle.load + pickle.dump",
            "ratio": ours_s / plain_s,
            "target": 2.0,
            "unit": "x, at most",
            "detail": f"{min(ours)[0] / min(plain)[0]:.2f} between the fastest runs, {num_windows} windows; "
            f"on the disk, both waiting for it: {ours_disk_s / plain_disk_s:.2f}",
        },
        {
            "name": "preprocess_qwentrend: peak memory",
            "ratio": ours_mb,
            "target": 500.0,
            "unit": "MB, at most",
            "detail": f"plain side {plain_mb:.0f} MB",
        },
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed and memory of preprocess_qwentrend.py.")
    parser.add_argument("--quick", action="store_true", help="20 episodes, one run after the warm-up")
    for row in rows(parser.parse_args().quick):
        verdict = "ok" if row["ratio"] <= row["target"] else "FALLS SHORT"
        print(
            f"{row['name']}: {row['ratio']:.2f} ({row['unit']} {row['target']:g}) {verdict}; {row['detail']}"
        )


if __name__ == "__main__":
    main()
