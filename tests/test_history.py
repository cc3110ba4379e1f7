"""History buffers: which windows are judged when, over resets, and which steps are paid for them."""

import itertools

import pytest
import torch
from torch import tensor

from common.history import HistoryBuffer, HistoryBufferConfig, HistoryBuffers, spread


def run(cfg: HistoryBufferConfig, ends: list[set[int]], num_envs: int = 1) -> list[dict[int, list[int]]]:
    """Feed 100 * env + step to each env; after each step: env -> the window, without its padding.

    ends[t]: envs whose episode ends at step t + 1. Entries that are not wanted are not handed over.
    """
    buffer = HistoryBuffer(cfg, num_envs)
    told = []
    for t, ended in enumerate(ends):
        wanted = buffer.wants_next().nonzero().squeeze(1)
        done = torch.tensor([env in ended for env in range(num_envs)])
        entries = {"x": (100 * wanted + t + 1)[:, None]} if len(wanted) else {}
        windows = buffer.append(entries, wanted, done)
        rows = windows.data["x"].squeeze(2).tolist() if len(windows.env_ids) else []
        told.append({})
        for env, length, row in zip(windows.env_ids.tolist(), windows.lengths.tolist(), rows, strict=True):
            assert len(row) == cfg.history_size
            assert row[:-length] == [row[-length]] * (cfg.history_size - length)  # the first entry fills up
            told[-1][env] = row[-length:]
    return told


def config(size: int, **changes) -> HistoryBufferConfig:
    return HistoryBufferConfig(size, history_keys=["x"], **changes)


def test_a_full_window_at_every_step_and_nothing_across_a_reset():
    told = run(config(3), [set(), set(), set(), {0}, set(), set(), set()])
    assert told == [{}, {}, {0: [1, 2, 3]}, {0: [2, 3, 4]}, {}, {}, {0: [5, 6, 7]}]


def test_shorter_windows_from_min_history_size_on():
    told = run(config(3, min_history_size=2), [set(), set(), set(), {0}, set(), set()])
    assert told == [{}, {0: [1, 2]}, {0: [1, 2, 3]}, {0: [2, 3, 4]}, {}, {0: [5, 6]}]


def test_the_interval_counts_from_the_reset():
    told = run(config(2, input_interval=3), [set()] * 3 + [{0}] + [set()] * 6)
    assert told == [{}, {}, {0: [2, 3]}, {}, {}, {}, {0: [6, 7]}, {}, {}, {0: [9, 10]}]


def test_at_the_end_what_is_left_since_the_interval():
    cfg = config(4, min_history_size=1, input_interval=3, input_on_done=True)
    told = run(cfg, [set(), set(), set(), set(), {0}, set(), set(), {0}, {0}])
    # step 5 ends: 4 and 5 are left over; step 8 is the third of its episode: no tail; 9 is a tail of one
    assert told == [{}, {}, {0: [1, 2, 3]}, {}, {0: [4, 5]}, {}, {}, {0: [6, 7, 8]}, {0: [9]}]


def test_a_tail_is_no_window_before_min_history_size():
    told = run(config(3, input_interval=2, input_on_done=True), [set(), {0}, set(), set(), {0}])
    assert told == [{}, {}, {}, {}, {0: [5]}]  # at 2 and 4 there are fewer than 3 entries


def test_how_long_an_episode_must_be_for_a_window():
    for size, least, interval, on_done in itertools.product((1, 3), (1, 2, 3), (1, 2, 4), (False, True)):
        if least <= size:
            cfg = config(size, min_history_size=least, input_interval=interval, input_on_done=on_done)
            for num_steps in range(1, 7):
                told = run(cfg, [set()] * (num_steps - 1) + [{0}])
                assert cfg.judges_within(num_steps) == any(told), (cfg, num_steps)


def test_envs_keep_their_own_count():
    told = run(config(2), [{1}, set(), {0}, set()], num_envs=2)
    assert told == [{}, {0: [1, 2]}, {0: [2, 3], 1: [102, 103]}, {1: [103, 104]}]


def test_only_frames_of_a_coming_window_are_wanted():
    buffer = HistoryBuffer(config(2, input_interval=4), 1)
    wanted = []
    for _ in range(9):
        wanted.append(bool(buffer.wants_next()))
        buffer.count += 1
    assert wanted == [False, False, True, True, False, False, True, True, False]


def test_a_frame_is_wanted_where_the_first_window_comes_late():
    """min_history_size 5 and interval 2: the first window is that of entries 5 and 6."""
    buffer = HistoryBuffer(config(5, input_interval=2), 1)
    wanted = []
    for _ in range(6):
        wanted.append(bool(buffer.wants_next()))
        buffer.count += 1
    assert wanted == [False, True, True, True, True, True]


def test_several_buffers_see_the_same_frames():
    buffers = HistoryBuffers({"short": config(1), "long": config(3, input_interval=3)}, 1)
    assert buffers.keys == ("x",)
    lengths = []
    for t in range(3):
        assert buffers.wants_next().tolist() == [True]
        windows = buffers.append({"x": tensor([[t]])}, tensor([0]), tensor([False]))
        lengths.append([w.lengths.tolist() for w in windows])
    assert lengths == [[[1], []], [[1], []], [[1], [3]]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"history_size": 0}, "at least 1"),
        ({"input_interval": 0}, "at least 1"),
        ({"min_history_size": 6}, r"must lie in \[1, history_size 5\]"),
        ({"history_keys": []}, "at least one key"),
    ],
)
def test_settings_check_themselves(changes, message):
    with pytest.raises(ValueError, match=message):
        HistoryBufferConfig(**changes)


def test_spread_pays_the_steps_of_the_window_alone():
    reward = tensor([[0.0], [0.0], [1.0], [10.0], [0.0]])
    lengths = tensor([[0], [0], [3], [3], [0]])
    done = torch.zeros(5, 1, dtype=torch.bool)
    assert spread(reward, lengths, done).squeeze(1).tolist() == [1.0, 11.0, 11.0, 10.0, 0.0]


def test_spread_stops_at_the_rollouts_start_and_at_an_episodes_end():
    reward = tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 4.0]])
    lengths = tensor([[4, 0], [0, 0], [0, 3]])
    done = tensor([[False, False], [False, True], [False, False]])
    assert spread(reward, lengths, done).tolist() == [[1.0, 0.0], [0.0, 0.0], [0.0, 4.0]]
