"""PickCube on a learned image reward alone: what `make pickcube` runs.

    python benchmarks/pickcube.py                                         # one seed
    python benchmarks/pickcube.py --seeds 0 1 2 --controls                # the README's table
    python benchmarks/pickcube.py --prior poor --seeds 0 1 2 --controls   # of the prior data 13 % succeed

Collects episodes as states of the simulator and draws them by two cameras, trains a classifier that says
whether the cube is at the goal, and lets it alone pay the reward in SAC. Runs the plain commands of the
workflow, each printed before it runs, and collects their numbers in `logs/pickcube/summary.json`. An earlier
`logs/pickcube` is moved aside, never overwritten. With several seeds every stage is run anew for each one, in
`logs/pickcube-seed<N>`, and the table is written to `benchmarks/results/pickcube.json` too.

`--controls` adds runs on the same data. Two only imitate, without Q, and end with the updates on prior data:
the episodes that the reward model pays, or all of them. One each is paid nothing, by true sparse success (the
upper bound), by scores shuffled among frames, and on the last frame of each episode (`terminal`). `few` and
`none` are paid as always, by the same classifier, but RL has 20 scripted episodes of prior data, or none.
"""

import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.demo import ONLY_IMITATE, move_aside, run_seeds, run_stage, seed_parser  # noqa: E402  not installed
from common.files import load_json, save_json  # noqa: E402
from common.runtime import run_script, versions  # noqa: E402

PRIORS = {"good": "configs/pickcube_collect.yaml", "poor": "configs/pickcube_poor_collect.yaml"}
LONGER = {
    "good": [],
    "poor": ["runner.max_steps=6000", "runner.val_check_interval=2000"],
}  # RL has more to do
PLAIN = "logs/pickcube"  # the folder that the shipped configs name
NEAR = "configs/pickcube_near_collect.yaml"
SINGLE_FRAMES = ["reward.hold_k=1", "reward.hold_n=1"]
TASKS = {  # what differs from PickCube, and the label
    "PickCube-v1": ([], "is_obj_placed"),
    "PlaceSphere-v1": (
        ["env.eval.task=PlaceSphere-v1", "env.eval.observe_fine.obj_to_goal_pos=[]"],  # it observes none
        "success",
    ),
}
CONTROLS = {
    "nothing": ["reward.reward_weight=0"],
    "imitation": ONLY_IMITATE,
    "imitation of all": [*ONLY_IMITATE, "reward.reward_threshold=0", *SINGLE_FRAMES],
    "truth": ["reward.use_reward_model=false", "reward.env_reward_weight=0.05"],
    "shuffled": ["reward.shuffle_scores=true", *SINGLE_FRAMES],  # two in a row would hardly ever be paid
    "terminal": [
        "reward.reward_mode=terminal",
        "algorithm.bootstrap_type=none",  # the reward comes on the last step of a fixed horizon
        *SINGLE_FRAMES,
        "reward.reward_weight=1",
    ],
    "few": [],
    "none": [
        *["algorithm.prior_data=null", "algorithm.offline_updates=0", "algorithm.learning_starts=500"],
        *["actor.model.norm_obs=false", "algorithm.rollout_noise=null"],
    ],
}
WITHOUT_PRIOR = ("few", "none")  # the same whatever the prior data


def stages(folder: str, seed: int, prior: str, task: str) -> dict[str, list[str]]:
    """Name -> plain command. The shipped configs say logs/pickcube; the command line says what differs."""
    differs, label = TASKS[task]
    seeded = [f"runner.seed={seed}"] if seed else []
    near, train, rl = ([f"runner.seed={500 + seed}"] if seed else []), list(seeded), list(seeded)
    if folder != PLAIN:
        train += [f"data.{split}_data_paths={folder}/reward_data/{split}.pt" for split in ("train", "val")]
        rl += [f"algorithm.prior_data={folder}/frames/prior/collected_data"]
        rl += [f"reward.model.model_path={folder}/resnet/checkpoint"]
    collect, near_misses = (["collect.py", config, *differs] for config in (PRIORS[prior], NEAR))
    draw = [*collect, "--render-from"]
    return {
        "collect": [*collect, into(folder, "collect"), *seeded],
        "collect near misses": [*near_misses, into(folder, "near"), *near],
        "draw": [*draw, f"{folder}/collect/collected_data", into(folder, "frames/prior")],
        "draw near misses": [*draw, f"{folder}/near/collected_data", into(folder, "frames/near")],
        "preprocess": [
            *["preprocess_resnet.py", "--raw-data-path", f"{folder}/frames"],
            *["--output-dir", f"{folder}/reward_data", "--label", label],
            *["--view", "main_images", "extra_view_images", "--fail-success-ratio", "10"],
        ],
        "train": ["train_resnet.py", "configs/pickcube_resnet.yaml", into(folder, "resnet"), *train],
        "rl": ["rl_train.py", "configs/pickcube_rl.yaml", into(folder, "rl"), *differs, *LONGER[prior], *rl],
    }


def into(folder: str, name: str) -> str:
    return f"runner.logger.log_path={folder}/{name}"


def run_seed(folder: str, seed: int, prior: str, task: str) -> dict:
    """All stages. -> what logs/pickcube/summary.json holds."""
    move_aside(ROOT / folder)
    start = time.perf_counter()
    seconds = {name: run_stage(command) for name, command in stages(folder, seed, prior, task).items()}
    seconds["all"] = round(time.perf_counter() - start, 1)
    collect, resnet, rl = (
        load_json(ROOT / folder / stage / "summary.json") for stage in ("collect", "resnet", "rl")
    )
    kept = ("true_success_once", "true_success_at_end", "learned_success", "hack_gap", "num_episodes")
    of_verdicts = ("precision", "precision_low", "precision_high")  # on those episodes; none: none was called
    summary = {
        "seed": seed,
        **{name: rl[name] for name in kept},
        **{name: rl.get(name) for name in of_verdicts},
        "prior_success_once": collect["num_successes"] / collect["num_episodes"],
        "classifier": resnet["val_metrics"],
        "seconds": seconds,
        "env_steps": {"collect": collect["env_steps"], "rl": rl["env_steps"]},
        "versions": versions(),
    }
    save_json(summary, ROOT / folder / "summary.json")
    return summary


def run_controls(folder: str, seed: int, prior: str, task: str) -> dict[str, list[float]]:
    """Control -> true success once and at the end."""
    command = [part for part in stages(folder, seed, prior, task)["rl"] if "log_path" not in part]
    out = {}
    for name, changes in CONTROLS.items():
        if prior != "good" and name in WITHOUT_PRIOR:
            continue
        to = f"rl_{name.replace(' ', '_')}"
        few = few_episodes(folder, seed, task) if name == "few" else []
        run_stage([*command, into(folder, to), *changes, *few])
        rl = load_json(ROOT / folder / to / "summary.json")
        out[name] = [rl["true_success_once"], rl["true_success_at_end"]]
    return out


def few_episodes(folder: str, seed: int, task: str) -> list[str]:
    """20 episodes of the scripted expert, and what makes RL use them instead of the prior data."""
    expert = ["runner.num_episodes=20", "policies=[{name: scripted, noise: [0.0, 0.1]}]"]
    collect = ["collect.py", PRIORS["good"], *TASKS[task][0]]
    run_stage([*collect, f"runner.seed={900 + seed}", *expert, into(folder, "few")])
    draw = [*collect, "--render-from", f"{folder}/few/collected_data"]
    run_stage([*draw, into(folder, "frames_few")])
    return [f"algorithm.prior_data={folder}/frames_few/collected_data"]


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
    print(f"look at {folder}/rl/traces.html, {folder}/rl/eval.mp4, {folder}/rl/curves.png")


def print_table(rows: list[dict]) -> None:
    """Markdown, for the README; success once / at the end."""
    columns = ("seed", "prior succeeds", "AUPRC", "true success", "gap, points", "precision on policy")
    columns += (*CONTROLS, "seconds")
    print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for row in rows:
        controls = row.get("controls", {})
        told = ["{:.2f} / {:.2f}".format(*controls[name]) if name in controls else "-" for name in CONTROLS]
        cells = [
            str(row["seed"]),
            f"{row['prior_success_once']:.2f}",
            f"{row['classifier']['auprc']:.3f}",
            f"{row['true_success_once']:.2f} / {row['true_success_at_end']:.2f}",
            f"{row['hack_gap']:+.1f}",
            "{precision:.3f} ({precision_low:.3f} to {precision_high:.3f})".format(**row)
            if row["precision"] is not None
            else "-",
            *told,
            f"{row['seconds']['all']:.0f}",
        ]
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = seed_parser(__doc__)
    parser.add_argument("--prior", choices=PRIORS, default="good", help="30 or 13 %% of its episodes succeed")
    parser.add_argument(
        "--task", choices=TASKS, default="PickCube-v1", help="another one, which nobody tuned"
    )
    args = parser.parse_args()
    plain = PLAIN if args.task == "PickCube-v1" else "logs/placesphere"
    plain += "" if args.prior == "good" else f"-{args.prior}"
    run, control = (partial(stage, prior=args.prior, task=args.task) for stage in (run_seed, run_controls))
    run_seeds(args, plain, run, control, print_report, print_table)


if __name__ == "__main__":
    run_script(main)
