"""preprocess_resnet.py against the least that the job takes: `pickle.load` of each file, one `torch.save`.

    python benchmarks/preprocess.py [--quick]

200 episodes x 51 frames x 2 views of 128x128 (1.0 GB; quick: 20 episodes), made in a temporary folder and
deleted afterwards. Both sides run in fresh processes, in turn, after one run of each that warms the page
cache. Time is that of the work, without imports. The plain side is told which frames to keep, checks nothing,
and does not wait for the disk. Memory is the peak of the whole process (`ru_maxrss`), imports included, plus
that of its largest child.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.episodes import write_episode  # noqa: E402

OURS = """
import sys, time
import preprocess_resnet
start = time.perf_counter()
sys.argv = ["preprocess_resnet.py", "--raw-data-path", "episodes", "--output-dir", "ours", "--overwrite"]
preprocess_resnet.main()
"""

PLAIN = """
import json, pickle, sys, time
import numpy, torch
start = time.perf_counter()
chosen = json.load(open("chosen.json"))
images, labels = [], []
for name, times in chosen.items():
    with open(name, "rb") as file:
        episode = pickle.load(file)
    images += [torch.from_numpy(episode["observations"][t]["main_images"]) for t in times]
    labels += [int(episode["infos"][t].get("success", False)) for t in times]
torch.save({"images": images, "labels": labels, "metadata": {}}, "plain.pt")
"""

REPORT = """
seconds = time.perf_counter() - start
import resource
peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print("RESULT", seconds, sum(peaks) / 1024, "torch" in sys.modules)
"""


def make_episodes(folder: Path, num_episodes: int, num_steps: int = 50, size: int = 128) -> None:
    """Half of them succeed, from step 35 on. Frames are drawn from 200 pictures of noise."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (200, size, size, 3), dtype=np.uint8)
    for index in range(num_episodes):
        success = index % 2 == 0
        observations = [
            {
                "main_images": pictures[rng.integers(len(pictures))],
                "extra_view_images": pictures[rng.integers(len(pictures))][None],
                "states": rng.standard_normal(42, dtype=np.float32),
            }
            for _ in range(num_steps + 1)
        ]
        episode = {
            "rank": 0,
            "env_idx": index % 8,
            "episode_id": index // 8,
            "step": index * num_steps,
            "success": success,
            "observations": observations,
            "actions": list(rng.standard_normal((num_steps, 4), dtype=np.float32)),
            "rewards": [0.0, *rng.random(num_steps).tolist()],
            "terminated": [False] * (num_steps + 1),
            "truncated": [False] * num_steps + [True],
            "infos": [{}]
            + [{"success": success and t >= 35, "elapsed_steps": t} for t in range(1, num_steps + 1)],
            "task": "PushCube-v1",
            "task_description": "Push the cube to the goal.",
            "render": {"width": size, "height": size},
        }
        write_episode(folder, episode)


def choose(folder: Path) -> None:
    """chosen.json: the frames that our side keeps, for the plain side."""
    import preprocess_resnet

    args = preprocess_resnet.parse_args(
        ["--raw-data-path", str(folder / "episodes"), "--output-dir", str(folder / "x")]
    )
    outlines, _ = preprocess_resnet.survey(preprocess_resnet.list_episodes(args.raw_data_path), args)
    _, chosen = preprocess_resnet.choose_frames(outlines, args)
    times = {}
    for frames in chosen.values():
        for index in np.unique(frames.episode):
            times[str(outlines[index].path)] = frames.time[frames.episode == index].tolist()
    (folder / "chosen.json").write_text(json.dumps(dict(sorted(times.items()))))


def run_once(code: str, folder: Path) -> tuple[float, float, bool]:
    """(seconds of work, peak MB, whether torch was imported) of `code` in a fresh process."""
    result = subprocess.run(
        [sys.executable, "-c", code + REPORT],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, peak, torch = result.stdout.split("RESULT")[1].split()
    return float(seconds), float(peak), torch == "True"


def rows(quick: bool) -> list[dict]:
    """Rows for benchmarks/run.py: time as a ratio to the plain side, peak memory in MB."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_episodes(folder / "episodes", 20 if quick else 200)
        choose(folder)
        ours, plain = [], []
        for _ in range(2 if quick else 6):
            ours.append(run_once(OURS, folder))
            plain.append(run_once(PLAIN, folder))
    (ours_s, ours_mb), (plain_s, plain_mb) = (
        [statistics.median(column) for column in list(zip(*runs[1:], strict=True))[:2]]
        for runs in (ours, plain)
    )
    with_torch = "torch imported" if ours[0][2] else "torch not imported"
    return [
        {
            "name": "preprocess_resnet: time against pickle.load + torch.save",
            "ratio": ours_s / plain_s,
            "target": 1.3,
            "unit": "x, at most",
            "detail": f"{min(ours[1:])[0] / min(plain[1:])[0]:.2f} between the fastest runs",
        },
        {
            "name": "preprocess_resnet: peak memory",
            "ratio": ours_mb,
            "target": 400.0,
            "unit": "MB, at most",
            "detail": f"{with_torch}; plain side {plain_mb:.0f} MB",
        },
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed and memory of preprocess_resnet.py.")
    parser.add_argument("--quick", action="store_true", help="20 episodes, one run after the warm-up")
    for row in rows(parser.parse_args().quick):
        verdict = "ok" if row["ratio"] <= row["target"] else "FALLS SHORT"
        print(
            f"{row['name']}: {row['ratio']:.2f} ({row['unit']} {row['target']:g}) {verdict}; {row['detail']}"
        )


if __name__ == "__main__":
    main()
