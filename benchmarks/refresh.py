"""What a refresh of the reward model is worth: a classifier that a policy fools, before and after it.

    python benchmarks/refresh.py            # in logs/refresh

The classifier is trained on PushCube episodes without an empty hand at the goal, and a policy finds that out.
Two policies are trained on its verdicts: one without a refresh, from another seed, whose training episodes
are recorded and become the frozen test; one with `reward.refresh_every`. Then each checkpoint of the
classifier judges the same frozen frames at its own threshold. No frame of the test is ever trained on.
"""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402  the checkout is not installed
import torch  # noqa: E402

from benchmarks.demo import run_stage  # noqa: E402
from common.episodes import list_episodes, read_episode  # noqa: E402
from common.files import load_json, save_json  # noqa: E402
from common.intervals import wilson_interval  # noqa: E402
from common.metrics import counts_at  # noqa: E402
from common.resnet_reward import ResNetRewardConfig, load_resnet  # noqa: E402
from common.runtime import run_script  # noqa: E402

POLICIES = (  # those of demo_collect.yaml without the empty hand at the goal
    "policies=[{name: scripted, weight: 0.35}, {name: scripted, weight: 0.35, noise: [0.1, 0.4]}, "
    "{name: scripted, weight: 0.2, noise: [0.05, 0.3], stop_after: [0.2, 0.8]}, {name: random, weight: 0.1}]"
)


def commands(folder: str, steps: int) -> list[list[str]]:
    data, model = f"{folder}/reward_data", f"{folder}/resnet/checkpoint"
    rl = [
        "rl_train.py",
        "configs/demo_rl.yaml",
        f"runner.max_steps={steps}",
        "runner.val_check_interval=1200",
        "runner.num_eval_episodes=40",
        "runner.num_final_episodes=60",
        f"reward.model.model_path={model}",
        f"algorithm.prior_data={folder}/collect/collected_data",
        "reward.audit={max_hack_gap: 10, min_episodes: 40}",
    ]
    recorded = [
        "env.train.data_collection.enabled=true",
        f"env.train.data_collection.save_dir={folder}/test",
    ]
    refreshed = [
        "reward.keep_hard=300",
        f"reward.refresh_every={steps // 3}",
        "reward.refresh_steps=80",
        "reward.refresh_config=configs/demo_resnet.yaml",
        f"reward.refresh_data={data}",
    ]
    collect = ["collect.py", "configs/demo_collect.yaml", "runner.num_episodes=200", POLICIES]
    paths = [f"data.train_data_paths={data}/train.pt", f"data.val_data_paths={data}/val.pt"]
    train = ["train_resnet.py", "configs/demo_resnet.yaml", "runner.max_steps=300", *paths]
    return [
        [*collect, f"runner.logger.log_path={folder}/collect"],
        ["preprocess_resnet.py", "--raw-data-path", f"{folder}/collect/collected_data", "--output-dir", data],
        [*train, f"runner.logger.log_path={folder}/resnet"],
        [*rl, "runner.seed=1", f"runner.logger.log_path={folder}/plain", *recorded],
        [*rl, f"runner.logger.log_path={folder}/refreshed", *refreshed],
    ]


def judge(model_path: Path, frames: torch.Tensor, truth: np.ndarray) -> dict:
    """What a checkpoint says of the frozen frames, at its own threshold, with Wilson's 95 % intervals."""
    model = load_resnet(ResNetRewardConfig(model_path=str(model_path)))
    counts = counts_at(model.score({"main_images": frames}).numpy(), truth, model.threshold)
    out = {"checkpoint": str(model_path), "threshold": model.threshold}
    for name, hits, trials in (
        ("false_positive_rate", counts.false_positives, int((~truth).sum())),
        ("recall", counts.true_positives, int(truth.sum())),
    ):
        low, high = wilson_interval(hits / trials, trials)
        out[name] = {"hits": hits, "of": trials, "rate": hits / trials, "low": low, "high": high}
    return out


def compare(folder: Path, test: Path) -> list[dict]:
    """The frames that were judged in the test's episodes, the last of each, by every checkpoint in order."""
    episodes = [read_episode(path) for path in list_episodes(test)]
    frames = torch.stack([torch.from_numpy(e.images["main_images"][-1]) for e in episodes])
    truth = np.array([bool(e.success[-1]) for e in episodes])
    refreshes = sorted((folder / "refreshed" / "refresh").glob("step_*/checkpoint"))
    rows = [judge(path, frames, truth) for path in (folder / "resnet" / "checkpoint", *refreshes)]
    for row in rows:
        shown = [row[name] for name in ("false_positive_rate", "recall")]
        cells = [
            f"{r['hits']} of {r['of']}: {r['rate']:.3f} [{r['low']:.3f}, {r['high']:.3f}]" for r in shown
        ]
        print(f"{row['checkpoint']}: failures called a success {cells[0]}; successes found {cells[1]}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default="logs/refresh")
    parser.add_argument("--steps", type=int, default=2400, help="env steps of each policy")
    args = parser.parse_args()
    os.chdir(ROOT)
    for command in commands(args.folder, args.steps):
        run_stage(command)
    folder = Path(args.folder)
    result = {"frozen": compare(folder, folder / "test")}
    for name in ("plain", "refreshed"):
        result[name] = load_json(folder / name / "summary.json")
    save_json(result, folder / "summary.json")


if __name__ == "__main__":
    run_script(main)
