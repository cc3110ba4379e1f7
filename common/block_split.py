"""Train and val of frames that an operator labelled: parted by episode, or by a block within one.

Frames that follow each other look alike: a val frame whose neighbour was trained on measures nothing. So val
is never drawn frame by frame. There may be few episodes, one even, which is why episodes may be cut.
"""

import numpy as np

from common.runtime import UserError

CUT_COST = 10.0  # more than all other costs of an arc together


def split_by_block(
    episode: np.ndarray, step: np.ndarray, label: np.ndarray, val_split: float, gap_steps: int, seed: int
) -> dict[str, np.ndarray]:
    """{"train", "val"}: sorted indices into frames given by episode, step (n,) int and label (n,) bool.

    The episodes lie on a circle in random order, their frames in order of time, and val is an arc of it. One
    arc always holds `val_split` of the successes and of the fails, to a frame. But val ends between episodes
    if an arc that does leaves each side at least half its share of both labels. Otherwise its ends may cut an
    episode, and train frames of that episode less than `gap_steps` from a val frame are in neither. The arc
    nearest to both shares is taken, a lost frame counting as one too few. Raises UserError where no arc gives
    both sides both labels. `seed`: of the episodes' order, and between arcs that are equally good.
    """
    num_success = int(label.sum())
    if num_success in (0, len(label)):
        missing = "fail" if num_success else "success"
        raise UserError(
            f"none of {len(label)} labelled frames is a {missing}; a classifier needs both, so label more"
        )
    rng = np.random.default_rng(seed)
    circle = _Circle(episode, step, label, gap_steps, rng)
    best_cost = np.inf
    for length in sorted(range(1, len(label)), key=lambda length: abs(length / len(label) - val_split)):
        if best_cost < abs(length / len(label) - val_split):
            break  # the shares of both labels cannot be nearer to val_split than that of all frames
        cost, train_start, train_stop = circle.judge(length, val_split)
        cost += 1e-9 * rng.random(len(cost))  # between equals
        start = int(cost.argmin())
        if cost[start] < best_cost:
            best_cost = cost[start]
            val, train = (start, start + length), (train_start[start], train_stop[start])
    if best_cost == np.inf:
        raise UserError(
            f"{num_success} success and {len(label) - num_success} fail frames are too few to split: train "
            f"and val need both, {gap_steps} steps apart within an episode; label more, best in new episodes"
        )
    return {"train": circle.frames(*train), "val": circle.frames(*val)}


class _Circle:
    """n frames on a circle. Arcs are named by their n possible starts; position n + i is i again."""

    def __init__(
        self,
        episode: np.ndarray,
        step: np.ndarray,
        label: np.ndarray,
        gap_steps: int,
        rng: np.random.Generator,
    ):
        _, number = np.unique(episode, return_inverse=True)
        place = rng.permutation(number.max() + 1)[number]
        self.order = np.lexsort((step, place))  # (n,) indices of the frames
        place, step = place[self.order], step[self.order]
        self.is_first = np.append(True, place[1:] != place[:-1])  # of its episode
        # of each frame: how many after it and before it are of its episode and nearer than the gap
        key = place * (step.max() + 2 * gap_steps) + step  # rises, between episodes by more than the gap
        position = np.arange(len(key))
        self.ahead = np.searchsorted(key, key + gap_steps) - 1 - position
        self.back = position - np.searchsorted(key, key - gap_steps, side="right")
        twice = np.tile(label[self.order], 2)
        # successes, fails before each position: (2n + 1,) each
        self.num_before = [np.append(0, held.cumsum()) for held in (twice, ~twice)]

    def judge(self, length: int, val_split: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each arc of `length` frames as val: its cost (n,), inf where a side would lack a label; and from
        where to where train goes."""
        num = len(self.order)
        start = np.arange(num)
        stop = start + length
        train_start = stop + self.ahead[(stop - 1) % num]
        train_stop = np.maximum(start + num - self.back, train_start)
        cost = (num - length - (train_stop - train_start)) / num  # the frames lost
        cut = ~(self.is_first & self.is_first[stop % num])
        for num_before in self.num_before:
            share = (num_before[stop] - num_before[start]) / num_before[num]
            cost += np.abs(share - val_split)
            cut |= (share < val_split / 2) | (1 - share < (1 - val_split) / 2)
            cost[(share == 0) | (num_before[train_stop] == num_before[train_start])] = np.inf
        return cost + CUT_COST * cut, train_start, train_stop

    def frames(self, start: int, stop: int) -> np.ndarray:
        return np.sort(self.order[np.arange(start, stop) % len(self.order)])
