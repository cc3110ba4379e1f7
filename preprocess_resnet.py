"""Make training data for the ResNet reward model from collected episodes: every frame an image and its label.

    python preprocess_resnet.py --raw-data-path logs/x/collected_data --output-dir logs/x/reward_data
    python preprocess_resnet.py --add logs/rl/hard --output-dir logs/x/reward_data    (more for train.pt)

In:   episodes (*.pkl), ours or RLinf's; format and label rule in common/episodes.py.
Out:  train.pt and val.pt, both or none; format in common/payload.py. Next: train_resnet.py.

Episodes are split, never frames: those of one episode look alike. The split is stratified by outcome, so that
val holds successes whenever two episodes do. Train is cut to `--fail-success-ratio` fails per success. Val
stays as it is, because precision and false positives mean something only at the prevalence that a policy will
meet (`--balance-val` cuts it as well, as RLinf does).

`--add` puts further labelled frames, such as those that `rl_train.py` kept because the model got them wrong,
into train.pt; val.pt is never touched, and no frame of it gets in (common/add_frames.py).

The episodes are read twice, first for their labels, then for the frames chosen: common/preprocessing.py.
"""

import argparse
import contextlib
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import preprocessing
from common.add_frames import add_frames
from common.episodes import VIEWS, frame_labels, list_episodes, read_episode, read_frames
from common.files import atomic_write, to_json
from common.payload import PayloadFile
from common.preprocessing import check_alike, keep_freed_memory, map_in_order, split_episodes
from common.runtime import UserError, run_script, versions

# -----------------------------------------------------------------------------------------------------------
# Settings


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Names and defaults are those of RLinf's `preprocess_reward_dataset.py`, and a few of our own."""
    parser = argparse.ArgumentParser(
        description="Collected episodes -> train.pt and val.pt for train_resnet.py.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    yes_no = argparse.BooleanOptionalAction
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--raw-data-path", type=Path, help="folder with episodes, searched with its subfolders")
    what.add_argument(
        "--add", type=Path, metavar="DIR", help="folder with episodes to add to OUTPUT_DIR/train.pt"
    )
    add("--output-dir", type=Path, default=Path("logs/processed_reward_data"), help="folder for both files")
    add("--train-output-path", type=Path, help="instead of OUTPUT_DIR/train.pt")
    add("--val-output-path", type=Path, help="instead of OUTPUT_DIR/val.pt")
    add("--num-samples-per-episode", type=int, default=0, help="frames, evenly spaced; 0: all")
    add("--keep-last-frame", action=yes_no, default=True, help="the last frame is among the evenly spaced")
    add("--val-split", type=float, default=0.2, help="fraction of the episodes")
    add("--fail-success-ratio", type=float, default=2.0, help="fail frames per success frame, at most")
    add("--balance-val", action=yes_no, default=False, help="cut val to that ratio as well")
    add("--label", help="key of the step infos that labels a frame; default: in_zone, else success")
    add("--view", choices=VIEWS, nargs="+", default=["main_images"], help="camera; both: two in one frame")
    add("--seed", type=int, default=42, help="of the split and of the choice of fail frames")
    add("--num-workers", type=int, default=1, help="threads that read; pays on cold or slow disks")
    add("--skip-bad", action="store_true", help="go on without unreadable episodes, and list them")
    add("--overwrite", action="store_true", help="replace existing output")
    args = parser.parse_args(argv)
    args.train_output_path = args.train_output_path or args.output_dir / "train.pt"
    args.val_output_path = args.val_output_path or args.output_dir / "val.pt"
    for name, valid, allowed in (
        ("num_samples_per_episode", args.num_samples_per_episode >= 0, "0 or more"),
        ("val_split", 0 < args.val_split < 1, "between 0 and 1"),
        ("fail_success_ratio", args.fail_success_ratio > 0, "above 0"),
        ("num_workers", args.num_workers >= 1, "1 or more"),
    ):
        if not valid:
            raise UserError(f"--{name.replace('_', '-')} {vars(args)[name]}: must be {allowed}")
    if args.train_output_path.absolute() == args.val_output_path.absolute():
        raise UserError(f"train and val would both be {args.train_output_path}; give them two names")
    for path in (args.train_output_path, args.val_output_path) if args.add is None else ():
        if path.exists() and not args.overwrite:
            raise UserError(f"{path} exists; add --overwrite to replace it, or choose another --output-dir")
    return args


# -----------------------------------------------------------------------------------------------------------
# First reading: labels


@dataclass
class Outline:
    """An episode without its pixels."""

    path: Path
    label: str  # key of the step infos
    labels: np.ndarray  # (T+1,) bool
    image_shape: tuple[int, int, int]  # (H, W, 3)
    task: str | None
    task_description: str | None
    render: dict | None  # as JSON would give it back: lists for tuples and arrays


def read_outline(path: Path, views: list[str], label: str | None) -> Outline | UserError:
    """A file of no use for these views and label gives the complaint, for the caller to raise or list."""
    try:
        episode = read_episode(path, views=())
        shapes = episode.image_shapes
        if missing := [view for view in views if view not in shapes]:
            met = ", ".join(shapes) or "no images"
            raise UserError(
                f"{path} has no view {missing[0]}, only {met}; choose another --view or collect it"
            )
        if len({shapes[view] for view in views}) > 1:
            met = " and ".join(f"{view} {shapes[view]}" for view in views)
            raise UserError(f"{path} has {met}; two cameras in one frame need one size")
        if label is None:  # success waits until the pose was held, and the frames before would lie
            label = "in_zone" if any("in_zone" in info for info in episode.infos) else "success"
        return Outline(
            path=path,
            label=label,
            labels=frame_labels(episode.infos, label, required=True),
            image_shape=shapes[views[0]],
            task=episode.task,
            task_description=episode.task_description,
            render=json.loads(to_json(episode.render)),
        )
    except UserError as error:
        return error
    except (TypeError, ValueError) as error:  # a label or `render` of no use
        return UserError(f"{path} {error}")


def survey(paths: list[Path], args: argparse.Namespace) -> tuple[list[Outline], list[str]]:
    """Outlines of usable episodes, which look alike, and complaints about the others."""
    read = partial(read_outline, views=args.view, label=args.label)
    outlines, bad = preprocessing.survey(read, paths, args.skip_bad, args.num_workers)
    traits = {
        "image sizes": lambda o: o.image_shape,
        "cameras ('render')": lambda o: o.render,
        "labels": lambda o: o.label,
    }
    check_alike(outlines, traits)
    return outlines, bad


# -----------------------------------------------------------------------------------------------------------
# Choice of frames


@dataclass
class Frames:
    """Frames named by episode (index into the outlines) and time, in that order."""

    episode: np.ndarray  # (n,) int
    time: np.ndarray  # (n,) int
    label: np.ndarray  # (n,) bool

    def __getitem__(self, chosen: np.ndarray) -> "Frames":
        return Frames(self.episode[chosen], self.time[chosen], self.label[chosen])

    def count(self) -> dict[str, int]:
        return {"success": int(self.label.sum()), "fail": int((~self.label).sum())}


def sample_times(num_frames: int, num_samples: int, keep_last_frame: bool) -> np.ndarray:
    """Evenly spaced times in 0..num_frames-1, at most `num_samples` of them; all where that is 0."""
    if num_samples == 0 or num_samples >= num_frames:
        return np.arange(num_frames)
    if keep_last_frame:
        return num_frames - 1 - (np.arange(num_samples)[::-1] * (num_frames - 1)) // max(1, num_samples - 1)
    return np.arange(num_samples) * num_frames // num_samples


def list_frames(outlines: list[Outline], num_samples: int, keep_last_frame: bool) -> Frames:
    times = [sample_times(len(outline.labels), num_samples, keep_last_frame) for outline in outlines]
    labels = [outline.labels[chosen] for outline, chosen in zip(outlines, times, strict=True)]
    episode = np.repeat(np.arange(len(outlines)), [len(chosen) for chosen in times])
    return Frames(episode, np.concatenate(times), np.concatenate(labels))


def cut_fails(frames: Frames, ratio: float, rng: np.random.Generator) -> Frames:
    """All successes and at most `int(successes * ratio)` fails drawn at random, in their old order."""
    fails = rng.permutation(np.flatnonzero(~frames.label))[: int(frames.label.sum() * ratio)]
    return frames[np.sort(np.concatenate([np.flatnonzero(frames.label), fails]))]


def choose_frames(
    outlines: list[Outline], args: argparse.Namespace
) -> tuple[dict[str, Frames], dict[str, Frames]]:
    """{"train", "val"} before the cut, and the same after it. Raises UserError if one would lack a class."""
    frames = list_frames(outlines, args.num_samples_per_episode, args.keep_last_frame)
    for missing, count in frames.count().items():
        if count == 0:
            raise UserError(
                f"none of the {len(frames.label)} frames in {args.raw_data_path} is a {missing} (label "
                f"'{outlines[0].label}'); a classifier needs both classes, so collect more episodes"
            )
    has_success = np.zeros(len(outlines), dtype=bool)
    has_success[frames.episode[frames.label]] = True
    if has_success.sum() < 2:
        raise UserError(
            f"only one episode in {args.raw_data_path} holds a success; train and val need one each, "
            "so collect more episodes"
        )
    rng = np.random.default_rng(args.seed)
    is_val = split_episodes(has_success, args.val_split, rng)[frames.episode]
    before = {"train": frames[~is_val], "val": frames[is_val]}
    after = {"train": cut_fails(before["train"], args.fail_success_ratio, rng), "val": before["val"]}
    if args.balance_val:
        after["val"] = cut_fails(before["val"], args.fail_success_ratio, rng)
    for split, chosen in after.items():
        for missing, count in chosen.count().items():
            if count == 0:
                raise UserError(
                    f"{split} would hold no {missing} frame; collect more episodes, or change --val-split, "
                    "--fail-success-ratio or --num-samples-per-episode"
                )
    return before, after


# -----------------------------------------------------------------------------------------------------------
# Second reading: frames


def describe(
    outlines: list[Outline],
    bad: list[str],
    before: dict[str, Frames],
    after: dict[str, Frames],
    args: argparse.Namespace,
) -> dict:
    """Metadata of both files: RLinf's keys first, then what else it takes to make the same files again."""
    return {
        "raw_data_path": str(args.raw_data_path),
        "num_samples_per_episode": args.num_samples_per_episode,
        "keep_last_frame": args.keep_last_frame,
        "val_split": args.val_split,
        "fail_success_ratio": args.fail_success_ratio,
        "random_seed": args.seed,
        "num_train_samples": len(after["train"].label),
        "num_val_samples": len(after["val"].label),
        "balance_val": args.balance_val,
        "label": outlines[0].label,
        "view": args.view[0],
        "views": args.view,
        "image_size": list(outlines[0].image_shape[:2]),  # [H, W] pixels
        "render": outlines[0].render,
        "tasks": sorted({outline.task for outline in outlines if outline.task}),
        "task_descriptions": sorted({o.task_description for o in outlines if o.task_description}),
        "episodes": {
            split: [str(outlines[i].path.relative_to(args.raw_data_path)) for i in np.unique(frames.episode)]
            for split, frames in before.items()
        },
        "skipped": bad,
        "frames_before_cut": {split: frames.count() for split, frames in before.items()},
        "frames": {split: frames.count() for split, frames in after.items()},
        "versions": versions(),
    }


def write(
    outlines: list[Outline],
    before: dict[str, Frames],
    chosen: dict[str, Frames],
    metadata: dict,
    args: argparse.Namespace,
) -> None:
    """Read the chosen frames and write train.pt and val.pt, both or none. `before`: before the cut."""
    tasks = []  # (episode, split, times), in the order of the episodes, which is that of each split's labels
    for split, frames in chosen.items():
        for episode in np.unique(frames.episode):
            tasks.append((episode, split, frames.time[frames.episode == episode]))
    tasks.sort(key=lambda task: task[0])

    def read(task: tuple[int, str, np.ndarray]) -> tuple[str, list[np.ndarray]]:
        episode, split, times = task
        by_view = [read_frames(outlines[episode].path, view, times) for view in args.view]
        if len(by_view) == 1:
            return split, by_view[0]
        return split, [np.stack(shown) for shown in zip(*by_view, strict=True)]

    with contextlib.ExitStack() as stack:
        files = {}
        for split, path in (("train", args.train_output_path), ("val", args.val_output_path)):
            temporary = stack.enter_context(atomic_write(path))
            files[split] = stack.enter_context(PayloadFile(temporary))
        results = map_in_order(read, tasks, args.num_workers)
        for split, images in tqdm(results, "frames", len(tasks), unit="ep", disable=None):
            for image in images:
                files[split].add(image)
        for split, file in files.items():
            frames = chosen[split]
            of_split, episode = np.unique(before[split].episode), frames.episode
            own = {
                "frame_episodes": np.searchsorted(of_split, episode).tolist(),  # into metadata["episodes"]
                "frame_steps": frames.time.tolist(),
            }
            file.finish(frames.label.astype(int).tolist(), {"split": split, **metadata, **own})


# -----------------------------------------------------------------------------------------------------------


def print_table(metadata: dict, num_files: int, args: argparse.Namespace) -> None:
    print(f"{'split':6} {'episodes':>8} {'success':>8} {'fail':>8} {'fail before cut':>16}")
    for split, path in (("train", args.train_output_path), ("val", args.val_output_path)):
        after, before = metadata["frames"][split], metadata["frames_before_cut"][split]
        print(
            f"{split:6} {len(metadata['episodes'][split]):8} {after['success']:8} {after['fail']:8} "
            f"{before['fail']:16}  {path}"
        )
    for complaint in metadata["skipped"]:
        print(f"skipped: {complaint}")
    if metadata["skipped"]:
        print(f"skipped {len(metadata['skipped'])} of {num_files} files")


def add(args: argparse.Namespace) -> None:
    """`--add`: the train split grows, or a copy of it does where --train-output-path names one."""
    train = args.output_dir / "train.pt"
    found = add_frames(args.add, train, args.val_output_path, args.train_output_path)
    print(f"{args.train_output_path}: {found.success} success and {found.fail} fail frames added at its end")
    if found.known:
        corrected = f"; of {len(found.corrected)} the label is corrected" if found.corrected else ""
        print(f"{found.known} frames were there already{corrected}")
    if found.unlabelled:
        print(f"{found.unlabelled} frames have no label: python collect.py --review {args.add}")
    for path in found.frozen:
        print(f"refused: {path} shares a frame with {args.val_output_path}")


def main() -> None:
    args = parse_args()
    keep_freed_memory()
    if args.add is not None:
        return add(args)
    paths = list_episodes(args.raw_data_path)
    outlines, bad = survey(paths, args)
    before, after = choose_frames(outlines, args)
    metadata = describe(outlines, bad, before, after, args)
    try:
        write(outlines, before, after, metadata, args)
    except OSError as error:
        raise UserError(
            f"cannot write {args.train_output_path} and {args.val_output_path}: {error}"
        ) from error
    print_table(metadata, len(paths), args)


if __name__ == "__main__":
    run_script(main)
