"""Make training data for a trend model (QwenTrend) from collected episodes: short windows and their labels.

    python preprocess_qwentrend.py --raw-data-path logs/x/collected_data --output-dir logs/x/windows

In:   episodes (*.pkl) with two views, ours or RLinf's; format in common/episodes.py.
Out:  a folder, whole or not at all: dataset_info.json; in train/ and eval/ a segments.jsonl with a row per
      window, and pkl/ with the frames of each. It may be moved. Next: train_vlm.py.

What a window is labelled, and by which score, says common/trend.py. Episodes are split, never windows; the
split is stratified by outcome. A positive window played backwards makes a negative one (RLinf's augmentation,
on by default): with natural negatives in the data, better without. `--natural-eval` keeps eval as a policy
would meet it: nothing reversed, nothing balanced.
"""

import argparse
import contextlib
import itertools
import json
import pickle
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
from tqdm import tqdm

from common import preprocessing
from common.episodes import VIEWS, list_episodes, read_episode
from common.files import save_json, to_json, whole_folder
from common.preprocessing import check_alike, keep_freed_memory, map_in_order, split_episodes
from common.prompts import TREND_TEMPLATE, fill
from common.runtime import UserError, run_script, versions
from common.trend import (
    FRAME_KEYS,
    LABELS,
    REVERSED,
    ScoreSource,
    Windows,
    cut,
    episode_score,
    list_windows,
    with_reversed,
)

SPLITS = ("train", "eval")

# -----------------------------------------------------------------------------------------------------------
# Settings


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Names and defaults are those of RLinf's `preprocess_qwentrend_reward_dataset.py`, and some of ours."""
    parser = argparse.ArgumentParser(
        description="Collected episodes -> labelled windows for train_vlm.py.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    yes_no = argparse.BooleanOptionalAction
    add = parser.add_argument
    add(
        "--raw-data-path", type=Path, required=True, help="folder with episodes, searched with its subfolders"
    )
    add("--output-dir", type=Path, default=Path("logs/processed_qwentrend_reward_data"), help="new folder")
    add("--window-size", type=int, default=5, help="frames")
    add("--stride", type=int, default=1, help="frames from one window to the next")
    add("--score", choices=get_args(ScoreSource), default="auto", help="what rises as the task advances")
    add("--delta-threshold", type=float, default=0.05, help="smaller changes of the score are unclear")
    add(
        "--tail-unclear-ratio",
        type=float,
        default=0.15,
        help="fraction of each episode's windows, the last ones, that is unclear whatever the score says; "
        "above 0 the moment of success is not positive",
    )
    add("--num-samples-per-episode", type=int, default=0, help="windows, evenly spaced; 0: all")
    add("--keep-last-window", action=yes_no, default=True, help="the last window is always among them")
    add("--val-split", type=float, default=0.1, help="fraction of the episodes")
    add("--balance-labels", action=yes_no, default=True, help="cut all labels to the rarest one's count")
    add("--max-samples-per-label", type=int, help="windows of a label in train, at most")
    add(
        "--eval-max-samples-per-label",
        type=int,
        help="the same in eval (default: in proportion to the episodes)",
    )
    add(
        "--reverse-positive-as-negative",
        action=yes_no,
        default=True,
        help="add each positive window, played backwards, as a negative one",
    )
    add(
        "--natural-eval",
        action="store_true",
        help="eval without reversed windows, neither balanced nor capped",
    )
    add("--task-description", help="instead of the episodes' own")
    add("--prompt-template", default=TREND_TEMPLATE, help="question with {task} and, maybe, {num_frames}")
    add("--seed", type=int, default=42, help="of the split and of balancing")
    add("--num-workers", type=int, default=2, help="threads that read and write")
    add("--skip-bad", action="store_true", help="go on without unusable episodes, and list them")
    add("--overwrite", action="store_true", help="replace an older dataset")
    args = parser.parse_args(argv)
    caps = (args.max_samples_per_label, args.eval_max_samples_per_label)
    for name, valid, allowed in (
        ("window_size", args.window_size >= 2, "2 or more"),
        ("stride", args.stride >= 1, "1 or more"),
        ("delta_threshold", args.delta_threshold >= 0, "0 or more"),
        ("tail_unclear_ratio", 0 <= args.tail_unclear_ratio < 1, "at least 0 and below 1"),
        ("num_samples_per_episode", args.num_samples_per_episode >= 0, "0 or more"),
        ("val_split", 0 < args.val_split < 1, "between 0 and 1"),
        ("max_samples_per_label", caps[0] is None or caps[0] >= 1, "1 or more"),
        ("eval_max_samples_per_label", caps[1] is None or caps[1] >= 1, "1 or more"),
        ("num_workers", args.num_workers >= 1, "1 or more"),
    ):
        if not valid:
            raise UserError(f"--{name.replace('_', '-')} {vars(args)[name]}: must be {allowed}")
    check_output(args.output_dir, args.raw_data_path, args.overwrite)
    return args


def check_output(output: Path, raw: Path, overwrite: bool) -> None:
    """UserError where the dataset's folder would mix with, or take away, what is there."""
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"{output} is a file; give a folder as --output-dir")
    if not any(output.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{output} is not empty; add --overwrite, or choose another --output-dir")
    if not (output / "dataset_info.json").is_file() or raw.resolve().is_relative_to(output.resolve()):
        raise UserError(
            f"{output} holds other things than a dataset of windows, and --overwrite would delete them; "
            "choose another --output-dir"
        )


# -----------------------------------------------------------------------------------------------------------
# First reading: scores


@dataclass
class Outline:
    """An episode without its pixels."""

    path: Path
    score: np.ndarray  # (T+1,) float64, rises as the task advances
    source: str  # of the score
    success: bool
    image_shapes: dict[str, tuple[int, int, int]]  # view -> (H, W, 3)
    task: str  # env id, or "" where the file does not say
    task_description: str
    render: dict | None  # as JSON would give it back: lists for tuples and arrays
    control: dict | None
    episode_id: int
    env_idx: int


def read_outline(path: Path, source: ScoreSource, task_description: str | None) -> Outline | UserError:
    """A file of no use gives the complaint, for the caller to raise or list."""
    try:
        episode = read_episode(path, views=())
        if missing := [view for view in VIEWS if view not in episode.image_shapes]:
            raise UserError(
                f"{path} has no view {missing[0]}, and a window shows two; collect with both cameras "
                "(env.*.cameras)"
            )
        task_description = task_description or episode.task_description
        if not task_description:
            raise UserError(f"{path} does not say its task; give --task-description")
        score, source = episode_score(episode, source)
        if not np.isfinite(score).all():
            raise UserError(f"{path} has a {source} that is not finite")
        render, control = (json.loads(to_json(value)) for value in (episode.render, episode.control))
        return Outline(
            path=path,
            score=score,
            source=source,
            success=bool(episode.success_once),
            image_shapes=episode.image_shapes,
            task=episode.task or "",
            task_description=task_description,
            render=render,
            control=control,
            episode_id=episode.episode_id,
            env_idx=episode.env_idx,
        )
    except UserError as error:
        return error
    except (TypeError, ValueError) as error:  # a score or `render` of no use
        return UserError(f"{path} {error}")


TRAITS = {
    "image sizes": lambda outline: outline.image_shapes,
    "cameras ('render')": lambda outline: outline.render,
    "controls (rate and mode)": lambda outline: outline.control,
    "score sources (choose one by --score)": lambda outline: outline.source,
}

# -----------------------------------------------------------------------------------------------------------
# Choice of windows


def choose_windows(
    outlines: list[Outline], args: argparse.Namespace
) -> tuple[dict[str, Windows], dict[str, Windows], np.ndarray]:
    """{"train", "eval"} before the cut, the same after it, and whether each episode is eval's.

    Raises UserError if one of them could not be learned from.
    """
    rng = np.random.default_rng(args.seed)
    is_eval = split_episodes(np.array([o.success for o in outlines]), args.val_split, rng)
    if not is_eval.any():  # one success, one fail
        is_eval[rng.integers(len(outlines))] = True
    if is_eval.all():
        raise UserError(f"only one usable episode in {args.raw_data_path}; train and eval need one each")
    windows = list_windows(
        [outline.score for outline in outlines],
        args.window_size,
        args.stride,
        args.num_samples_per_episode,
        args.keep_last_window,
        args.delta_threshold,
        args.tail_unclear_ratio,
    )
    sides = {"train": windows[~is_eval[windows.episode]], "eval": windows[is_eval[windows.episode]]}
    for split, side in sides.items():
        held = [LABELS[label] for label in np.unique(side.label)]
        if len(held) < 2:
            raise UserError(
                f"the {len(side)} windows of {split} are {held[0] if held else 'none'} only; collect more "
                f"or longer episodes, or change --delta-threshold (now {args.delta_threshold:g}), "
                "--tail-unclear-ratio or --val-split"
            )
    natural = {"train": False, "eval": args.natural_eval}
    if args.reverse_positive_as_negative:
        sides = {name: side if natural[name] else with_reversed(side) for name, side in sides.items()}
    caps = {"train": args.max_samples_per_label, "eval": args.eval_max_samples_per_label}
    if caps["train"] and not caps["eval"]:
        caps["eval"] = max(1, round(caps["train"] * is_eval.sum() / (~is_eval).sum()))
    chosen = {
        name: side if natural[name] else cut(side, args.balance_labels, caps[name], rng)
        for name, side in sides.items()
    }
    return sides, chosen, is_eval


# -----------------------------------------------------------------------------------------------------------
# Second reading: frames


@dataclass
class Job:
    """What one episode gives to its split."""

    outline: Outline
    split: str
    windows: Windows
    first_id: int  # the number of its first window within the split


def list_jobs(outlines: list[Outline], chosen: dict[str, Windows]) -> Iterator[Job]:
    for split, windows in chosen.items():
        edges = np.flatnonzero(np.diff(windows.episode, prepend=-1, append=-1))
        for first, last in itertools.pairwise(edges):
            outline = outlines[windows.episode[first]]
            yield Job(outline, split, windows[np.arange(first, last)], int(first))


def write_job(job: Job, folder: Path, args: argparse.Namespace) -> tuple[str, list[str]]:
    """Write the episode's windows -> (split, their lines of segments.jsonl)."""
    images = read_episode(job.outline.path, VIEWS).images
    lines = []
    for number in range(len(job.windows)):
        row, times = describe_window(job, number, args)
        sample = {key: [images[view][t] for t in times] for view, key in FRAME_KEYS.items()}
        sample["label"] = row["answer"]
        sample["score"] = row["supervision"]["score"]
        sample["source_episode_path"] = row["source_episode_path"]
        sample["start_idx"] = row["segment_metadata"]["start_step"]
        sample["end_idx"] = row["segment_metadata"]["end_step"]
        sample["augmentation"] = row["segment_metadata"]["augmentation"]
        with (folder / row["pkl_path"]).open("wb") as file:
            pickle.dump(sample, file, protocol=4)  # the reference's
        lines.append(to_json(row))
    return job.split, lines


def describe_window(job: Job, number: int, args: argparse.Namespace) -> tuple[dict[str, Any], np.ndarray]:
    """(a row of segments.jsonl with the reference's fields, (K,) times of its frames as they are shown)."""
    outline, windows = job.outline, job.windows
    label, backwards = LABELS[windows.label[number]], bool(windows.reversed[number])
    start = int(windows.start[number])
    times = np.arange(start, start + args.window_size)
    times = times[::-1] if backwards else times
    first, last = (float(outline.score[t]) for t in (times[0], times[-1]))
    prompt = fill(args.prompt_template, outline.task_description, args.window_size)
    content = [{"type": "video", "video": view} for view in VIEWS] + [{"type": "text", "text": prompt}]
    row = {
        "task": outline.task_description,
        "prompt": prompt,
        "question": prompt,
        "answer": label,
        "pkl_path": f"{job.split}/pkl/{label}_{job.first_id + number:06d}.pkl",
        "messages": [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": label}]},
        ],
        "source_episode_path": str(outline.path.relative_to(args.raw_data_path)),
        "segment_metadata": {
            "start_step": start,
            "end_step": start + args.window_size - 1,
            "window_size": args.window_size,
            "episode_id": outline.episode_id,
            "env_idx": outline.env_idx,
            "success": outline.success,
            "augmentation": REVERSED if backwards else "none",
            "views": list(VIEWS),
        },
        "supervision": {
            "label": label,
            "score": last - first,
            "score_name": "delta",
            "score_source": outline.source,
            "delta_threshold": args.delta_threshold,
            "start_gae": first,  # RLinf's names, whatever the source
            "end_gae": last,
        },
    }
    return row, times


def write(outlines: list[Outline], chosen: dict[str, Windows], info: dict, args: argparse.Namespace) -> None:
    jobs = list(list_jobs(outlines, chosen))
    with whole_folder(args.output_dir) as folder, contextlib.ExitStack() as stack:
        files = {}
        for split in SPLITS:
            (folder / split / "pkl").mkdir(parents=True)
            files[split] = stack.enter_context(
                (folder / split / "segments.jsonl").open("w", encoding="utf-8")
            )
        results = map_in_order(partial(write_job, folder=folder, args=args), jobs, args.num_workers)
        for split, lines in tqdm(results, "windows", len(jobs), unit="ep", disable=None):
            files[split].writelines(f"{line}\n" for line in lines)
        stack.close()
        save_json(info, folder / "dataset_info.json")


def describe(
    outlines: list[Outline],
    bad: list[str],
    before: dict[str, Windows],
    after: dict[str, Windows],
    is_eval: np.ndarray,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """dataset_info.json: what it takes to make the same dataset again, and to know what it is."""
    first = outlines[0]
    ranges = [float(np.ptp(outline.score)) for outline in outlines]
    options = (
        "window_size",
        "stride",
        "delta_threshold",
        "tail_unclear_ratio",
        "num_samples_per_episode",
        "keep_last_window",
        "val_split",
        "balance_labels",
        "max_samples_per_label",
        "eval_max_samples_per_label",
        "reverse_positive_as_negative",
        "natural_eval",
        "seed",
    )
    return {
        "raw_data_path": str(args.raw_data_path),
        **{name: vars(args)[name] for name in options},
        "score_source": first.source,
        "score_range": {"median": np.median(ranges), "p90": np.quantile(ranges, 0.9)},  # of an episode
        "template": args.prompt_template,
        "labels": list(LABELS),
        "views": list(VIEWS),
        "frame_size": {view: list(shape[:2]) for view, shape in first.image_shapes.items()},  # [H, W] pixels
        "render": first.render,
        "control": first.control,
        "tasks": sorted({outline.task for outline in outlines if outline.task}),
        "task_descriptions": sorted({outline.task_description for outline in outlines}),
        "windows_before_cut": {split: windows.count() for split, windows in before.items()},
        "counts": {split: windows.count() for split, windows in after.items()},
        "episodes": {
            split: [
                str(outline.path.relative_to(args.raw_data_path))
                for outline, in_eval in zip(outlines, is_eval, strict=True)
                if in_eval == (split == "eval")
            ]
            for split in SPLITS
        },
        "skipped": bad,
        "versions": versions(),
    }


# -----------------------------------------------------------------------------------------------------------


def print_table(info: dict[str, Any], outlines: list[Outline], args: argparse.Namespace) -> None:
    """Label counts per split and source, and what to be wary of."""
    print(f"{'split':6} {'episodes':>8} {'windows':9} " + " ".join(f"{label:>9}" for label in LABELS))
    for split in SPLITS:
        for source, counts in info["counts"][split].items():
            episodes = len(info["episodes"][split]) if source == "natural" else ""
            numbers = " ".join(f"{counts[label]:9}" for label in LABELS)
            print(f"{split:6} {episodes:>8} {source:9} {numbers}")
        total = Counter()
        for counts in info["counts"][split].values():
            total.update(counts)
        if missing := [label for label in LABELS if not total[label]]:
            print(f"careful: {split} has no {' and no '.join(missing)} window")
    if short := sum(len(outline.score) < args.window_size for outline in outlines):
        print(f"{short} episodes are shorter than a window")
    length = np.median([len(outline.score) - 1 for outline in outlines])
    covered = args.delta_threshold * length / (args.window_size - 1)
    moves = info["score_range"]["median"]
    print(
        f"score: {info['score_source']}. It moves by {moves:.3g} in an episode (median); windows laid end to "
        f"end, each at the threshold, make {covered:.3g}."
    )
    if covered < moves:
        print(
            "careful: a policy that crawls, just above --delta-threshold, would be paid as well as one that "
            f"arrives; {moves * (args.window_size - 1) / length:.2g} or more would prevent it"
        )
    for complaint in info["skipped"]:
        print(f"skipped: {complaint}")
    print(f"written to {args.output_dir}")


def main() -> None:
    args = parse_args()
    keep_freed_memory()
    paths = list_episodes(args.raw_data_path)
    read = partial(read_outline, source=args.score, task_description=args.task_description)
    outlines, bad = preprocessing.survey(read, paths, args.skip_bad, args.num_workers)
    check_alike(outlines, TRAITS)
    before, after, is_eval = choose_windows(outlines, args)
    info = describe(outlines, bad, before, after, is_eval, args)
    try:
        write(outlines, after, info, args)
    except OSError as error:
        raise UserError(f"cannot write {args.output_dir}: {error}") from error
    print_table(info, outlines, args)


if __name__ == "__main__":
    run_script(main)
