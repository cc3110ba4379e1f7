"""The trend workflow, small and for real: what `make demo-trend` runs.

    python benchmarks/demo_trend.py                            # one seed
    python benchmarks/demo_trend.py --seeds 0 1 2 --controls   # the README's table, and two columns more

Collects episodes of PushCube that advance and lose ground, makes windows of them, trains a tiny Qwen3-VL (a
random one, made offline) to say each window's trend, holds it against a model that sees the last frame alone,
and lets it alone pay the reward in SAC. Runs the plain commands of the workflow, each printed before it runs,
and collects their numbers in `logs/demo_trend/summary.json`. An earlier `logs/demo_trend` is moved aside,
never overwritten. With several seeds every stage is run anew for each one, in `logs/demo_trend-seed<N>`, and
the table is written to `benchmarks/results/demo_trend.json` too.

`--controls` adds three runs on the same data: paid nothing, paid by the label rule itself, which is what a
perfect model would pay, and imitation alone, of the episodes that the trained model pays most.
"""

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.demo import ONLY_IMITATE, move_aside, run_seeds, run_stage, seed_parser  # noqa: E402
from common.files import load_json, save_json  # noqa: E402
from common.runtime import run_script, versions  # noqa: E402
from common.trend_report import card_table  # noqa: E402

CONTROLS = ("imitation", "nothing", "oracle")
COLUMNS = (
    "seed",
    "macro-F1",
    "negative F1",
    "played backwards, labels flipped: accuracy",
    "frozen, called positive",
    "true success once / at the end",
    "imitation alone",
    "paid nothing",
    "paid by the label rule",
    "last frame alone: macro-F1",
    "seconds",
)
PLAIN = "logs/demo_trend"  # the folder that the shipped configs name


def stages(folder: str, seed: int) -> dict[str, list[str]]:
    """Name -> plain command. The shipped configs say logs/demo_trend; the command line says what differs."""
    seeded = [f"runner.seed={seed}"] if seed else []
    collect, train, rl = list(seeded), list(seeded), list(seeded)
    if folder != PLAIN:
        collect += [f"runner.logger.log_path={folder}/collect"]
        train += [
            f"data.train_data_paths={folder}/windows/train/segments.jsonl",
            f"data.val_data_paths={folder}/windows/eval/segments.jsonl",
            f"actor.model.model_path={folder}/tiny_qwen",
        ]
        rl += [f"algorithm.prior_data={folder}/collect/collected_data"]
    windows = ["--raw-data-path", f"{folder}/collect/collected_data", "--output-dir", f"{folder}/windows"]
    # Natural windows alone: the mix has negatives of its own. The whole prompt would be most of what so small
    # a model computes.
    windows += ["--delta-threshold", "0.1", "--tail-unclear-ratio", "0", "--val-split", "0.2"]
    windows += ["--natural-eval", "--no-balance-labels", "--no-reverse-positive-as-negative"]
    windows += ["--prompt-template", "{task}?"]
    vlm = ["train_vlm.py", "configs/demo_trend_vlm.yaml", *train, f"runner.logger.log_path={folder}/vlm"]
    # Its best chance: drawn as often as they are, it says unclear to all.
    last = [*vlm[:-1], "data.frames=last", "data.random_reverse=0", "data.balance_labels=true"]
    return {
        "make the model": ["benchmarks/tiny_qwen.py", f"{folder}/tiny_qwen", "--seed", str(seed)],
        "collect": ["collect.py", "configs/demo_trend_collect.yaml", *collect],
        "windows": ["preprocess_qwentrend.py", *windows],
        "train": vlm,
        "train on last frames": [*last, f"runner.logger.log_path={folder}/vlm_last_frame"],
        "rl": [
            "rl_train.py",
            "configs/demo_trend_rl.yaml",
            *rl,
            f"runner.logger.log_path={folder}/rl",
            f"reward.model.model_path={folder}/vlm/checkpoint",
        ],
    }


def numbers(folder: str, seconds: dict[str, float], seed: int) -> dict:
    """What logs/demo_trend/summary.json holds."""
    collect, vlm, last, rl = (
        load_json(ROOT / folder / stage / "summary.json")
        for stage in ("collect", "vlm", "vlm_last_frame", "rl")
    )
    kept = ("true_success_once", "true_success_at_end", "model_return", "num_episodes")
    # Not of a policy whose episodes were all paid the same, or of whose windows none was called positive.
    where_known = ("progress_corr", "false_positive_share")
    return {
        "seed": seed,
        **{name: rl[name] for name in kept},
        **{name: rl.get(name) for name in where_known},
        "report_card": vlm["report_card"],
        "val_metrics": vlm["val_metrics"],
        "last_frame": last["val_metrics"],
        "seconds": seconds,
        "env_steps": {"collect": collect["env_steps"], "rl": rl["env_steps"]},
        "versions": versions(),
    }


def run_demo(folder: str, seed: int) -> dict:
    move_aside(ROOT / folder)
    start = time.perf_counter()
    seconds = {name: run_stage(command) for name, command in stages(folder, seed).items()}
    seconds["all"] = round(time.perf_counter() - start, 1)
    summary = numbers(folder, seconds, seed)
    save_json(summary, ROOT / folder / "summary.json")
    return summary


def run_controls(folder: str, seed: int) -> dict:
    """True success of the same RL on the same data paid nothing and paid what a perfect model would pay, and
    of a policy that only imitates, before its first step in the env."""
    command = [part for part in stages(folder, seed)["rl"] if "log_path" not in part]
    run_stage([*command, f"runner.logger.log_path={folder}/rl_imitation", *ONLY_IMITATE])
    # Neither needs the trained model: zero times anything is nothing, and the label rule knows the distances.
    seeded = [part for part in command[2:] if "reward.model" not in part]
    perfect = ["rl_train.py", "configs/demo_trend_oracle.yaml", *seeded]
    run_stage([*perfect, f"runner.logger.log_path={folder}/rl_nothing", "reward.reward_weight=0"])
    run_stage([*perfect, f"runner.logger.log_path={folder}/rl_oracle"])
    return {
        name: load_json(ROOT / folder / f"rl_{name}" / "summary.json")["true_success_once"]
        for name in CONTROLS
    }


def print_report(folder: str, summary: dict) -> None:
    print(f"\n{'stage':<22}{'seconds':>9}")
    for name, seconds in summary["seconds"].items():
        print(f"{name:<22}{seconds:>9}")
    print(f"\n{card_table(summary['report_card'])}")
    seen, blind = summary["val_metrics"]["macro_f1"], summary["last_frame"]["macro_f1"]
    print(f"macro-F1 of all held-out windows: {seen:.3f}; a model of their last frames alone: {blind:.3f}")
    truth = f"{summary['true_success_once']:.2f} once, {summary['true_success_at_end']:.2f} at the end"
    print(f"\nTRUE success in {summary['num_episodes']} fresh episodes, paid by the trend alone: {truth}")
    corr, false = (told(summary[name]) for name in ("progress_corr", "false_positive_share"))
    print(f"correlation of pay and true progress: {corr}; of windows called positive false: {false}")
    print(f"look at {folder}/rl/traces.html in a browser, and at {folder}/vlm/report/examples.png")


def told(number: float | None) -> str:
    return "-" if number is None else f"{number:.2f}"


def print_table(rows: list[dict]) -> None:
    """Markdown: the README's columns, and two more."""
    print(f"\n| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for row in rows:
        card = {entry["control"]: entry for entry in row["report_card"]}
        controls, f1 = row.get("controls", {}), row["val_metrics"]
        cells = [
            str(row["seed"]),
            f"{f1['macro_f1']:.3f}",
            f"{f1['f1_negative']:.3f}",
            f"{card['reversed, labels flipped']['accuracy']:.3f}",
            f"{card['frozen (last frame)']['called_positive']:.0%}",
            f"{row['true_success_once']:.2f} / {row['true_success_at_end']:.2f}",
            *(told(controls.get(name)) for name in CONTROLS),
            f"{row['last_frame']['macro_f1']:.3f}",
            f"{row['seconds']['all']:.0f}",
        ]
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    run_seeds(seed_parser(__doc__).parse_args(), PLAIN, run_demo, run_controls, print_report, print_table)


if __name__ == "__main__":
    run_script(main)
