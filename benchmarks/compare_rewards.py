"""Five rewards, one task: how far SAC gets on each, against env steps and seconds, and how it is fooled.

    python benchmarks/compare_rewards.py --seeds 0 1 2                            # the README's table
    python benchmarks/compare_rewards.py --trend logs/demo_trend/vlm/checkpoint   # what is there is used
    python benchmarks/compare_rewards.py --only "env dense" --set algorithm.utd=2 # settings of all RL runs

PushCube-v1 as in make demo-trend: its cameras, 20 steps at 10 Hz, its mix of episodes as prior data, its SAC
(configs/env/demo_trend_sac.yaml: gamma 0.95, one-step returns, no bootstrapping at the time limit, one torch
thread), all without imitation, which would make every run start from the same copied episodes. The five
differ in who pays, in `reward` that is, and in nothing else but this: where the env pays sparsely, prior data
must be paid so too, and is recorded anew with the same seed, that is the same episodes without pictures.

Plain commands of the workflow, printed before they run; a stage whose output is there already is kept, so a
comparison that was cut short goes on. `--trend` and `--resnet` name checkpoints for every seed; `{seed}` in a
path is its number. Else both models are trained on the seed's own episodes. In `logs/compare-seed<N>`; the
numbers of every evaluation go to benchmarks/results/compare_rewards.csv, the picture to
docs/compare_rewards.png, and the table to the console.

A policy is the best one by its own reward's evaluations, never by the truth. `share of time` is what the
learner waits for the reward model; the work of its process, of renderers and simulators is in the CPU
seconds, of all processes together, which a busy machine changes least.
"""

import argparse
import csv
import io
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import demo_trend  # noqa: E402  the checkout is not installed
from benchmarks.demo import move_aside, run_stage  # noqa: E402
from common.audit import gap_lower_bound  # noqa: E402
from common.files import atomic_write, load_json, save_json  # noqa: E402
from common.intervals import wilson_interval  # noqa: E402
from common.report import GREY, STYLE, curve, read_metrics, save_figure  # noqa: E402
from common.runtime import run_script  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ENV_PAYS = ["reward.use_reward_model=false", "reward.env_reward_weight=1"]
RESNET = ["reward.model.model_type=resnet", "reward.model.model_path={resnet}"]
REWARDS = {  # name -> what its run adds to the common command
    "env dense": ENV_PAYS,
    "env sparse": [*ENV_PAYS, "env.train.reward_mode=sparse", "env.eval.reward_mode=sparse"],
    "ResNet per_step": ["reward.reward_mode=per_step", *RESNET],
    "ResNet terminal": ["reward.reward_mode=terminal", *RESNET],
    "trend history_buffer": [
        *["reward.model.model_type=history_vlm", "reward.model.model_path={trend}"],
        "reward.model.reward_parser_params={{positive_reward: 1.0, negative_reward: -1.0}}",
    ],
}
LOOKS = {  # in the picture
    "env dense": {"color": "black", "marker": "o"},
    "env sparse": {"color": GREY, "marker": "s", "linestyle": "--"},
    "ResNet per_step": {"color": "#0072B2", "marker": "^"},
    "ResNet terminal": {"color": "#56B4E9", "marker": "v", "linestyle": "--"},
    "trend history_buffer": {"color": "#009E73", "marker": "D", "linestyle": ":"},
}
COLUMNS = (
    *("reward", "seed", "what", "env_steps", "wall_s", "cpu_s", "reward_share", "num_episodes"),
    *("true_success_once", "true_success_at_end", "learned_success", "fooled", "missed"),
    "false_positive_share",
)
CSV = ROOT / "benchmarks" / "results" / "compare_rewards.csv"
PICTURE = ROOT / "docs" / "compare_rewards.png"


# ----------------------------------------------------------------------------------------------------
# Commands


def stages(folder: str, seed: int, args: argparse.Namespace) -> dict[str, tuple[str, list[str]]]:
    """Name -> what it leaves behind, and the plain command: what the RL runs of one seed need."""
    trend, episodes = demo_trend.stages(folder, seed), f"{folder}/collect/collected_data"
    collect = [*trend["collect"], f"runner.num_episodes={args.episodes}"]
    unseen = ["env.eval.reward_mode=sparse", "env.eval.data_collection.frames=sim_state"]
    data = f"{folder}/reward_data"
    out = {
        "collect": (f"{folder}/collect/summary.json", collect),
        "collect, paid sparsely": (
            f"{folder}/sparse/summary.json",
            [*collect, *unseen, f"runner.logger.log_path={folder}/sparse"],
        ),
    }
    if args.trend is None:
        for name, output in (
            ("make the model", "tiny_qwen"),
            ("windows", "windows"),
            ("train", "vlm/summary.json"),
        ):
            out[f"trend: {name}"] = f"{folder}/{output}", trend[name]
    if args.resnet is None:
        frames = ["preprocess_resnet.py", "--raw-data-path", episodes, "--output-dir", data]
        train = [f"data.{split}_data_paths={data}/{split}.pt" for split in ("train", "val")]
        train += [f"runner.seed={seed}", f"runner.logger.log_path={folder}/resnet"]
        out["ResNet: frames"] = f"{data}/val.pt", frames
        out["ResNet: train"] = (
            f"{folder}/resnet/summary.json",
            ["train_resnet.py", "configs/demo_resnet.yaml", *train],
        )
    return out


def rl_command(name: str, folder: str, seed: int, args: argparse.Namespace) -> list[str]:
    paths = {
        "trend": (args.trend or f"{folder}/vlm/checkpoint").format(seed=seed),
        "resnet": (args.resnet or f"{folder}/resnet/checkpoint").format(seed=seed),
    }
    prior = "sparse" if name == "env sparse" else "collect"
    return [
        *["rl_train.py", "configs/env/demo_trend_sac.yaml", f"runner.seed={seed}"],
        *[f"runner.logger.log_path={run_folder(name, folder)}", f"runner.max_steps={args.steps}"],
        *[f"runner.val_check_interval={max(args.steps // 4, 1)}", "runner.num_video_episodes=0"],
        *[f"algorithm.prior_data={folder}/{prior}/collected_data", "algorithm.imitation_coef=0"],
        *(change.format(**paths) for change in REWARDS[name]),
        *args.set,
    ]


def run_folder(name: str, folder: str) -> str:
    return f"{folder}/rl_{name.replace(' ', '_')}"


def run_seed(folder: str, seed: int, args: argparse.Namespace) -> list[dict]:
    """What is not there yet of one seed. -> the CSV's rows of all its runs that are done."""
    for output, command in stages(folder, seed, args).values():
        if not (ROOT / output).exists():
            run_stage(command)
    rows = []
    for name in REWARDS:
        to = ROOT / run_folder(name, folder)
        if name in args.only and not is_done(to):
            move_aside(to)
            before = children_cpu_s()
            run_stage(rl_command(name, folder, seed, args))
            save_json(children_cpu_s() - before, to / "cpu_s.json")
        rows += run_rows(name, seed, to) if is_done(to) else []
    return rows


def is_done(run: Path) -> bool:
    """A run that was cut short is run anew: this file is written last."""
    return (run / "cpu_s.json").exists()


def children_cpu_s() -> float:
    """Of all processes that this one has started and seen the end of, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# ----------------------------------------------------------------------------------------------------
# Numbers


def run_rows(name: str, seed: int, folder: Path) -> list[dict]:
    """A row for each evaluation while it learned, and one (`final`) for fresh episodes of the best policy."""
    metrics, final = read_metrics(folder / "metrics.jsonl"), load_json(folder / "summary.json")
    rows = []
    for line in metrics:
        evaluation = {tag.removeprefix("eval/"): value for tag, value in line.items() if "eval/" in tag}
        if evaluation:
            clock = {"env_steps": line["step"], "wall_s": line["time/wall_s"]}
            rows.append({"what": "evaluation", **evaluation, **clock})
    spent = {
        "wall_s": final["seconds"]["training"],
        "cpu_s": load_json(folder / "cpu_s.json"),
        "reward_share": time_share(metrics),
    }
    rows.append({"what": "final", **final, **spent})
    of_run = {"reward": name, "seed": seed}
    return [{column: {**row, **of_run}.get(column) for column in COLUMNS} for row in rows]


def time_share(metrics: list[dict]) -> float:
    """Share of a run's wall time until its last log line that the learner waited for the reward model.

    Each line has the share since the line before it; 0 where there is no model.
    """
    _, share = curve(metrics, "reward/share_of_time")
    lines = [row for row in metrics if row.get("reward/share_of_time") is not None]
    waited, before = 0.0, 0.0
    for row, part in zip(lines, share, strict=True):
        waited += part * (row["time/wall_s"] - before)
        before = row["time/wall_s"]
    return waited / before if before else 0.0


def pooled(rows: list[dict], column: str) -> tuple[int, int, float, float]:
    """Episodes with, of how many, and the ends of Wilson's 95 % interval, over the episodes of all rows."""
    episodes = round(sum(row["num_episodes"] for row in rows))
    count = sum(round(row[column] * row["num_episodes"]) for row in rows)
    return count, episodes, *wilson_interval(count / episodes, episodes)


def pooled_gap(rows: list[dict]) -> tuple[float, float, float]:
    """Hack gap in points of a hundred and its 95 % interval, over the episodes of all rows."""
    fooled, episodes, *_ = pooled(rows, "fooled")
    missed, *_ = pooled(rows, "missed")
    low = gap_lower_bound(fooled, missed, episodes, 0.975)
    high = -gap_lower_bound(missed, fooled, episodes, 0.975)
    return 100 * (fooled - missed) / episodes, 100 * low, 100 * high


def mean(rows: list[dict], column: str) -> float:
    return sum(row[column] for row in rows) / len(rows)


def print_table(rows: list[dict]) -> None:
    """Markdown, for the README."""
    columns = ("reward", "true success once", "at the end", "hack gap, points", "waits for the reward")
    columns += ("seconds", "CPU seconds")
    print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name in REWARDS:
        mine = [row for row in rows if row["reward"] == name and row["what"] == "final"]
        if not mine:
            continue
        once, end = (told(*pooled(mine, f"true_success_{when}")) for when in ("once", "at_end"))
        spent = f"{mean(mine, 'wall_s'):.0f} | {mean(mine, 'cpu_s'):.0f}"
        print(f"| {name} | {once} | {end} | {gap_cell(mine)} | {mean(mine, 'reward_share'):.0%} | {spent} |")


def told(count: int, episodes: int, low: float, high: float) -> str:
    return f"{count / episodes:.2f} ({low:.2f} to {high:.2f}, n = {episodes})"


def gap_cell(rows: list[dict]) -> str:
    """The trend of a window is no verdict on an episode: how many of its positives are wrong says as much."""
    if rows[0]["fooled"] is not None:
        return "{:+.1f} ({:+.1f} to {:+.1f})".format(*pooled_gap(rows))
    shares = [row["false_positive_share"] for row in rows if row["false_positive_share"] is not None]
    return f"{sum(shares) / len(shares):.0%} of positives wrong" if shares else "-"


def save_csv(rows: list[dict], path: Path) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    for row in rows:
        rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
        table.writerow(rounded)
    with atomic_write(path) as temporary:
        temporary.write_text(text.getvalue())


# ----------------------------------------------------------------------------------------------------
# Picture


def draw(rows: list[dict], path: Path) -> None:
    """Left true success over env steps, in the middle over seconds, right the hack gap. Lines are all seeds
    together, bands Wilson's 95 % interval."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        by_steps, by_seconds, gap = figure.subplots(1, 3)
        by_seconds.sharey(by_steps)
        for name, look in LOOKS.items():
            mine = [row for row in rows if row["reward"] == name and row["what"] == "evaluation"]
            if mine:
                draw_reward(by_steps, by_seconds, gap, name, look, mine)
        by_steps.set(xlabel="env steps", ylabel="true success, at least once", ylim=(-0.03, 1.03))
        by_steps.set_xlim(left=0)
        by_seconds.set(xlabel="wall seconds, evaluations included")
        by_seconds.set_xlim(left=0)
        by_seconds.tick_params(labelleft=False)
        if not gap.has_data():
            gap.text(0.5, 0.5, "no ResNet among them", color=GREY, ha="center", transform=gap.transAxes)
        gap.axhline(0, color=GREY, linewidth=0.8)
        gap.set(xlabel="env steps", ylabel="hack gap: learned - true, points")
        gap.set_xlim(left=0)
        figure.legend(*by_steps.get_legend_handles_labels(), loc="outside upper center", ncols=len(LOOKS))
        save_figure(figure, path)


def draw_reward(
    by_steps: "Axes", by_seconds: "Axes", gap: "Axes", name: str, look: dict, rows: list[dict]
) -> None:
    steps = sorted({row["env_steps"] for row in rows})
    at = [[row for row in rows if row["env_steps"] == step] for step in steps]
    seconds = [mean(same, "wall_s") for same in at]
    success = [pooled(same, "true_success_once") for same in at]
    for axes, x in ((by_steps, steps), (by_seconds, seconds)):
        axes.plot(x, [count / episodes for count, episodes, *_ in success], label=name, **look)
        low, high = zip(*((low, high) for _, _, low, high in success), strict=True)
        axes.fill_between(x, low, high, color=look["color"], alpha=0.12, linewidth=0)
    if rows[0]["fooled"] is not None:
        points, low, high = zip(*map(pooled_gap, at), strict=True)
        gap.plot(steps, points, **look)
        gap.fill_between(steps, low, high, color=look["color"], alpha=0.12, linewidth=0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0], help="of every stage (default: 0)")
    add(
        "--only",
        nargs="+",
        choices=REWARDS,
        default=list(REWARDS),
        metavar="REWARD",
        help="runs no other one now",
    )
    add("--steps", type=int, default=4000, help="env steps of each RL run (default: 4000)")
    add("--episodes", type=int, default=1600, help="of prior data, and to train both models on")
    add("--resnet", metavar="CHECKPOINT", help="a classifier that is there already, of the same pictures")
    add("--trend", metavar="CHECKPOINT", help="a trend model that is there already, of the same pictures")
    add("--folder", default="logs/compare", help="-seed<N> is added (default: logs/compare)")
    add("--results", type=Path, default=CSV, help="the CSV")
    add("--picture", type=Path, default=PICTURE)
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of rl_train.py, in all runs alike")
    args = parser.parse_args()
    rows = []
    for seed in args.seeds:
        rows += run_seed(f"{args.folder}-seed{seed}", seed, args)
        save_csv(rows, args.results)
    draw(rows, args.picture)
    print_table(rows)


if __name__ == "__main__":
    run_script(main)
