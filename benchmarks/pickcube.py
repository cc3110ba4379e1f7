"""PickCube on a learned image reward alone: what `make pickcube` runs.

    python benchmarks/pickcube.py                            # one seed
    python benchmarks/pickcube.py --seeds 0 1 2 --controls   # the README's table

Collects episodes as states of the simulator and draws them by two cameras, trains a classifier that says
whether the cube is at the goal, and lets it alone pay the reward in SAC. Runs the plain commands of the
workflow, each printed before it runs, and collects their numbers in `logs/pickcube/summary.json`. An earlier
`logs/pickcube` is moved aside, never overwritten. With several seeds every stage is run anew for each one, in
`logs/pickcube-seed<N>`, and the table is written to `benchmarks/results/pickcube.json` too.

`--controls` adds runs on the same data: paid nothing, paid by true sparse success, and the policy before its
first step in the env, which imitates the episodes that the reward model pays.
"""

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.demo import move_aside, run_seeds, run_stage  # noqa: E402  the checkout is not installed
from common.files import load_json, save_json  # noqa: E402
from common.runtime import run_script, versions  # noqa: E402

PLAIN = "logs/pickcube"  # the folder that the shipped configs name
CONTROLS = {
    "nothing": ["reward.reward_weight=0"],
    "imitation": ["runner.max_steps=2"],
    "truth": ["reward.use_reward_model=false", "reward.env_reward_weight=1"],
}


def stages(folder: str, seed: int) -> dict[str, list[str]]:
    """Name -> plain command. The shipped configs say logs/pickcube; the command line says what differs."""
    seeded = [f"runner.seed={seed}"] if seed else []
    near, train, rl = ([f"runner.seed={500 + seed}"] if seed else []), list(seeded), list(seeded)
    if folder != PLAIN:
        train += [f"data.{split}_data_paths={folder}/reward_data/{split}.pt" for split in ("train", "val")]
        rl += [f"algorithm.prior_data={folder}/frames/prior/collected_data"]
        rl += [f"reward.model.model_path={folder}/resnet/checkpoint"]

    def into(name: str) -> str:
        return f"runner.logger.log_path={folder}/{name}"

    collect = ["collect.py", "configs/pickcube_collect.yaml"]
    draw = [*collect, "--render-from"]
    return {
        "collect": [*collect, into("collect"), *seeded],
        "collect near misses": ["collect.py", "configs/pickcube_near_collect.yaml", into("near"), *near],
        "draw": [*draw, f"{folder}/collect/collected_data", into("frames/prior")],
        "draw near misses": [*draw, f"{folder}/near/collected_data", into("frames/near")],
        "preprocess": [
            *["preprocess_resnet.py", "--raw-data-path", f"{folder}/frames"],
            *["--output-dir", f"{folder}/reward_data", "--label", "is_obj_placed"],
            *["--view", "main_images", "extra_view_images", "--fail-success-ratio", "10"],
        ],
        "train": ["train_resnet.py", "configs/pickcube_resnet.yaml", into("resnet"), *train],
        "rl": ["rl_train.py", "configs/pickcube_rl.yaml", into("rl"), *rl],
    }


def run_seed(folder: str, seed: int) -> dict:
    """All stages. -> what logs/pickcube/summary.json holds."""
    move_aside(ROOT / folder)
    start = time.perf_counter()
    seconds = {name: run_stage(command) for name, command in stages(folder, seed).items()}
    seconds["all"] = round(time.perf_counter() - start, 1)
    collect, resnet, rl = (
        load_json(ROOT / folder / stage / "summary.json") for stage in ("collect", "resnet", "rl")
    )
    kept = ("true_success_once", "true_success_at_end", "learned_success", "hack_gap", "num_episodes")
    summary = {
        "seed": seed,
        **{name: rl[name] for name in kept},
        "prior_success_once": collect["num_successes"] / collect["num_episodes"],
        "classifier": resnet["val_metrics"],
        "seconds": seconds,
        "env_steps": {"collect": collect["env_steps"], "rl": rl["env_steps"]},
        "versions": versions(),
    }
    save_json(summary, ROOT / folder / "summary.json")
    return summary


def run_controls(folder: str, seed: int) -> dict[str, list[float]]:
    """Control -> true success once and at the end."""
    command = [part for part in stages(folder, seed)["rl"] if "log_path" not in part]
    out = {}
    for name, changes in CONTROLS.items():
        run_stage([*command, f"runner.logger.log_path={folder}/rl_{name}", *changes])
        rl = load_json(ROOT / folder / f"rl_{name}" / "summary.json")
        out[name] = [rl["true_success_once"], rl["true_success_at_end"]]
    return out


def print_report(folder: str, summary: dict) -> None:
    print(f"\n{'stage':<22}{'seconds':>9}")
    for name, seconds in summary["seconds"].items():
        print(f"{name:<22}{seconds:>9}")
    card = summary["classifier"]
    print(
        f"\nclassifier, held-out frames: AUPRC {card['auprc']:.3f}, precision {card['precision']:.3f}, "
        f"recall {card['recall']:.3f}; {summary['prior_success_once']:.0%} of the prior episodes ever succeed"
    )
    truth = f"{summary['true_success_once']:.2f} once, {summary['true_success_at_end']:.2f} at the end"
    print(f"TRUE success in {summary['num_episodes']} fresh episodes: {truth}")
    print(f"by the reward model: {summary['learned_success']:.2f} (gap {summary['hack_gap']:+.1f} points)")
    print(f"look at {folder}/rl/eval.mp4, {folder}/rl/scores.png, {folder}/rl/curves.png")


def print_table(rows: list[dict]) -> None:
    """Markdown, for the README; success once / at the end."""
    print(
        "\n| seed | prior succeeds | AUPRC | true success | gap, points | imitation alone | paid nothing "
        "| paid by true success | seconds |\n" + "|---" * 9 + "|"
    )
    for row in rows:
        controls = row.get("controls", {})
        told = {
            name: "{:.2f} / {:.2f}".format(*controls[name]) if name in controls else "-" for name in CONTROLS
        }
        print(
            f"| {row['seed']} | {row['prior_success_once']:.2f} | {row['classifier']['auprc']:.3f} "
            f"| {row['true_success_once']:.2f} / {row['true_success_at_end']:.2f} | {row['hack_gap']:+.1f} "
            f"| {told['imitation']} | {told['nothing']} | {told['truth']} | {row['seconds']['all']:.0f} |"
        )


def main() -> None:
    run_seeds(__doc__, PLAIN, run_seed, run_controls, print_report, print_table)


if __name__ == "__main__":
    run_script(main)
