"""The whole workflow, small and for real: what `make demo` runs.

    python benchmarks/demo.py                             # one seed, 2 min 17 s on 2 idle cores
    python benchmarks/demo.py --seeds 0 1 2 --controls    # the README's table

Runs the plain commands of the workflow, each printed before it runs, and collects their numbers in
`logs/demo/summary.json`. An earlier `logs/demo` is moved aside, never overwritten. With several seeds every
stage is run anew for each one, in `logs/demo-seed<N>`, and the table is written to
`benchmarks/results/demo.json` too. `--controls` adds the same RL paid nothing, and the classifier's report
card on 400 fresh episodes of the policy that it has trained.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.files import load_json, save_json  # noqa: E402  the checkout is not installed
from common.runtime import run_script, versions  # noqa: E402

# Before the first env step; next to this coefficient Q counts for nothing, and Adam knows no scale.
ONLY_IMITATE = ["runner.max_steps=2", "algorithm.imitation_coef=10000"]
ON_POLICY = {"auprc": "AUPRC", "precision": "precision", "recall": "recall"}  # of the report card


def stages(folder: str, seed: int) -> dict[str, list[str]]:
    """Name -> plain command. The shipped configs say logs/demo; the command line says what differs."""
    seeded = [f"runner.seed={seed}"] if seed else []
    collect, train, rl = list(seeded), list(seeded), list(seeded)
    if folder != "logs/demo":
        collect += [f"runner.logger.log_path={folder}/collect"]
        train += [
            f"runner.logger.log_path={folder}/resnet",
            f"data.train_data_paths={folder}/reward_data/train.pt",
        ]
        train += [f"data.val_data_paths={folder}/reward_data/val.pt"]
        rl += [f"runner.logger.log_path={folder}/rl", f"reward.model.model_path={folder}/resnet/checkpoint"]
        rl += [f"algorithm.prior_data={folder}/collect/collected_data"]
    preprocess = [
        "--raw-data-path",
        f"{folder}/collect/collected_data",
        "--output-dir",
        f"{folder}/reward_data",
    ]
    return {
        "collect": ["collect.py", "configs/demo_collect.yaml", *collect],
        "preprocess": ["preprocess_resnet.py", *preprocess],
        "train": ["train_resnet.py", "configs/demo_resnet.yaml", *train],
        "rl": ["rl_train.py", "configs/demo_rl.yaml", *rl],
    }


def run_stage(command: list[str]) -> float:
    """Print and run one command from the checkout. -> seconds."""
    print(f"\n$ python {shlex.join(command)}", flush=True)
    start = time.perf_counter()
    # Threads that wait for each other sleep: where others use the cores too, spinning costs ten times more.
    env = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    with subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:  # the stage has got it too, and saves what it has
            process.wait()
            raise
    if code:
        sys.exit(code)
    return round(time.perf_counter() - start, 1)


def run_demo(folder: str, seed: int) -> dict:
    """All stages for one seed. -> what logs/demo/summary.json holds."""
    move_aside(ROOT / folder)
    start = time.perf_counter()
    seconds = {name: run_stage(command) for name, command in stages(folder, seed).items()}
    seconds["all"] = round(time.perf_counter() - start, 1)
    collect = load_json(ROOT / folder / "collect" / "summary.json")
    rl = load_json(ROOT / folder / "rl" / "summary.json")
    kept = (
        "true_success_once",
        "true_success_at_end",
        "learned_success",
        "hack_gap",
        "num_episodes",
        "best_step",
    )
    summary = {
        "seed": seed,
        **{name: rl[name] for name in kept},
        "seconds": seconds,
        "env_steps": {"collect": collect["env_steps"], "rl": rl["env_steps"]},
        "versions": versions(),
    }
    save_json(summary, ROOT / folder / "summary.json")
    return summary


def run_controls(folder: str, seed: int) -> dict:
    """RL paid nothing, for what the learned reward adds; and the classifier's card on the policy's frames."""
    command = [part for part in stages(folder, seed)["rl"] if "log_path" not in part]
    run_stage([*command, f"runner.logger.log_path={folder}/control", "reward.reward_weight=0"])
    rollouts, frames, card = (f"{folder}/{name}" for name in ("rollouts", "rollout_data", "rollout_card"))
    policy = f"policies=[{{name: checkpoint, path: {folder}/rl/checkpoints/best, deterministic: true}}]"
    told = [f"runner.seed={700 + seed}", "runner.num_episodes=400", f"runner.logger.log_path={rollouts}"]
    run_stage(["collect.py", "configs/demo_collect.yaml", policy, *told])
    data = [f"{rollouts}/collected_data", "--output-dir", frames]
    run_stage(["preprocess_resnet.py", "--raw-data-path", *data])
    files = [f"{frames}/train.pt", f"{frames}/val.pt"]
    checkpoint = f"{folder}/resnet/checkpoint"
    run_stage(["train_resnet.py", "--report", checkpoint, *files, "--output-dir", card])
    return {
        "nothing": load_json(ROOT / folder / "control" / "summary.json"),
        "on_policy": load_json(ROOT / card / "report.json"),
    }


def move_aside(folder: Path) -> None:
    if folder.exists():
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(folder.stat().st_mtime))
        aside = folder.with_name(f"{folder.name}-{stamp}")
        folder.rename(aside)
        print(f"moved the earlier {folder.name} to {aside.name}")


def seed_parser(doc: str) -> argparse.ArgumentParser:
    """The command line of a demo; `run_seeds` takes what it parsed."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of every stage (default 0)")
    parser.add_argument("--seeds", type=int, nargs="+", help="run them all and print the table")
    parser.add_argument("--controls", action="store_true", help="also the control runs")
    return parser


def run_seeds(
    args: argparse.Namespace,
    plain: str,
    run_seed: Callable[[str, int], dict],
    run_controls: Callable[[str, int], dict],
    print_report: Callable[[str, dict], None],
    print_table: Callable[[list[dict]], None],
) -> None:
    """A demo in the folder `plain`; several seeds in `plain-seed<N>`, their rows in benchmarks/results."""
    rows = []
    for seed in args.seeds or [args.seed]:
        folder = f"{plain}-seed{seed}" if args.seeds else plain
        rows.append(run_seed(folder, seed))
        if args.seeds:  # so far, should what follows be cut short
            save_json(rows, ROOT / f"{plain}-seeds.json")
        if args.controls:
            rows[-1]["controls"] = run_controls(folder, seed)
        print_report(folder, rows[-1])
    if args.seeds or args.controls:
        print_table(rows)
    if args.seeds:
        save_json(rows, ROOT / "benchmarks" / "results" / f"{Path(plain).name}.json")


def print_report(folder: str, summary: dict) -> None:
    print(f"\n{'stage':<12}{'seconds':>9}")
    for name, seconds in summary["seconds"].items():
        print(f"{name:<12}{seconds:>9}")
    truth = f"{summary['true_success_once']:.2f} once, {summary['true_success_at_end']:.2f} at the end"
    print(f"\nTRUE success in {summary['num_episodes']} fresh episodes: {truth}")
    print(f"by the reward model: {summary['learned_success']:.2f} (gap {summary['hack_gap']:+.1f} points)")
    print(f"look at {folder}/rl/traces.html in a browser, and at eval.mp4, scores.png, curves.png beside it")


def print_table(rows: list[dict]) -> None:
    """Markdown, for the README."""
    columns = ("seed", "true success once", "at the end", "learned", "gap, points", "paid nothing: once")
    columns += tuple(f"{name} on policy" for name in ON_POLICY.values())
    columns += ("seconds",)
    print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for row in rows:
        controls = row.get("controls")
        nothing = f"{controls['nothing']['true_success_once']:.2f}" if controls else "-"
        scores = [controls["on_policy"]["scores"][name] for name in ON_POLICY] if controls else []
        cells = [
            str(row["seed"]),
            *(f"{row[name]:.2f}" for name in ("true_success_once", "true_success_at_end", "learned_success")),
            f"{row['hack_gap']:+.1f}",
            nothing,
            *("{value:.3f} ({interval[0]:.3f} to {interval[1]:.3f})".format(**score) for score in scores),
            *["-"] * (len(ON_POLICY) - len(scores)),
            f"{row['seconds']['all']:.0f}",
        ]
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    run_seeds(
        seed_parser(__doc__).parse_args(), "logs/demo", run_demo, run_controls, print_report, print_table
    )


if __name__ == "__main__":
    run_script(main)
