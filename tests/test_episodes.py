"""The episode format, the writer thread, and the image data sets."""

import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from common.episodes import (
    EpisodeWriter,
    frame_labels,
    list_episodes,
    read_episode,
    read_frames,
    write_episode,
)
from common.payload import PayloadFile, RewardBinaryDataset, RewardDatasetPayload
from common.runtime import UserError

T = 3


def image(value: int, shape=(4, 6, 3)) -> np.ndarray:
    """Not symmetric in any axis, so that a swapped one would show."""
    return (np.arange(np.prod(shape)).reshape(shape) + value).astype(np.uint8)


def make_episode(**changes) -> dict:
    """Three steps, success at the last one, in the layout we write."""
    episode = {
        "rank": 0,
        "env_idx": 2,
        "episode_id": 5,
        "step": 70,
        "success": True,
        "observations": [
            {
                "main_images": image(t),
                "extra_view_images": image(100 + t)[None],
                "states": np.array([t, -t], dtype=np.float32),
            }
            for t in range(T + 1)
        ],
        "actions": [np.array([t, 0.5], dtype=np.float32) for t in range(T)],
        "rewards": [0.0, 0.25, 0.5, 1.0],
        "terminated": [False, False, False, True],
        "truncated": [False] * (T + 1),
        "infos": [{}, {"success": False}, {"success": False}, {"success": True}],
        "task": "PushCube-v1",
        "task_description": "Push the cube to the goal.",
        "render": {"width": 6, "fov": 0.85},
    }
    return {**episode, **changes}


def dump(path: Path, episode: object) -> Path:
    path.write_bytes(pickle.dumps(episode))
    return path


def rlinf_episode(reset_entry: bool) -> dict:
    """As RLinf writes: torch tensors, 0-d and 1-element scalars, (H, W, 3) second view, no task or render."""
    first = 0 if reset_entry else 1
    return {
        "rank": 0,
        "env_idx": 1,
        "episode_id": 4,
        "success": torch.tensor(True),
        "observations": [
            {
                "main_images": torch.from_numpy(image(t)),
                "extra_view_images": torch.from_numpy(image(100 + t)),
                "states": torch.tensor([t, -t], dtype=torch.float32),
            }
            for t in range(T + 1)
        ],
        "actions": [torch.tensor([t, 0.5]) for t in range(T)],
        "rewards": [torch.tensor(value) for value in (0.0, 0.25, 0.5, 1.0)[first:]],
        "terminated": [torch.tensor([value]) for value in (False, False, False, True)[first:]],
        "truncated": [np.array(False)] * (T + 1 - first),
        "infos": [
            {},
            {"success": torch.tensor(False)},
            {"success": np.array([False])},
            {"episode": {"success_once": torch.tensor(True)}},
        ][first:],
    }


def test_round_trip_is_bit_exact(tmp_path):
    episode = make_episode()
    path = write_episode(tmp_path, episode)
    assert path.name == "rank_0_env_2_episode_5_step_70_success.pkl"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]

    back = read_episode(path, views=None)
    assert back.layout == "T+1"
    assert back.length == T
    for view, offset in (("main_images", 0), ("extra_view_images", 100)):
        assert back.images[view].dtype == np.uint8
        np.testing.assert_array_equal(back.images[view], np.stack([image(offset + t) for t in range(T + 1)]))
    np.testing.assert_array_equal(back.states, [[0, 0], [1, -1], [2, -2], [3, -3]])
    np.testing.assert_array_equal(back.actions, [[0, 0.5], [1, 0.5], [2, 0.5]])
    np.testing.assert_array_equal(back.rewards, [0, 0.25, 0.5, 1])
    np.testing.assert_array_equal(back.terminated, [False, False, False, True])
    assert not back.truncated.any()
    np.testing.assert_array_equal(back.success, [False, False, False, True])
    assert {a.dtype for a in (back.states, back.actions, back.rewards)} == {np.dtype(np.float32)}
    assert {a.dtype for a in (back.terminated, back.truncated, back.success)} == {np.dtype(bool)}
    assert back.success_once is True
    assert back.render == episode["render"]
    assert (back.task, back.task_description) == ("PushCube-v1", "Push the cube to the goal.")
    assert (back.env_idx, back.episode_id, back.step) == (2, 5, 70)
    # and the file itself is the dict that went in, for readers that are not ours
    assert pickle.loads(path.read_bytes())["infos"] == episode["infos"]


def test_views_are_read_on_request(tmp_path):
    path = write_episode(tmp_path, make_episode())
    assert list(read_episode(path).images) == ["main_images"]
    without = read_episode(path, views=())
    assert without.images == {}
    assert without.image_shapes == {"main_images": (4, 6, 3), "extra_view_images": (4, 6, 3)}
    np.testing.assert_array_equal(
        read_frames(path, "extra_view_images", [3, 1]), np.stack([image(103), image(101)])
    )


@pytest.mark.parametrize("reset_entry", [True, False])
def test_both_rlinf_layouts_align_with_the_observations(tmp_path, reset_entry):
    path = dump(tmp_path / "rank_0_env_1_episode_4_success.pkl", rlinf_episode(reset_entry))
    episode = read_episode(path, views=None)
    assert episode.layout == ("T+1" if reset_entry else "T")
    np.testing.assert_array_equal(episode.rewards, [0, 0.25, 0.5, 1])
    np.testing.assert_array_equal(episode.terminated, [False, False, False, True])
    np.testing.assert_array_equal(episode.truncated, [False] * (T + 1))
    np.testing.assert_array_equal(episode.success, [False, False, False, True])
    assert [len(info) for info in episode.infos] == [0, 1, 1, 1]
    assert episode.success_once is True
    assert (episode.task, episode.render, episode.step) == (None, None, 0)
    np.testing.assert_array_equal(episode.states[3], [3, -3])
    np.testing.assert_array_equal(episode.images["extra_view_images"][2], image(102))
    assert all(type(frames) is np.ndarray for frames in episode.images.values())


def test_of_several_extra_views_the_first_is_taken(tmp_path):
    episode = make_episode()
    for t, observation in enumerate(episode["observations"]):
        observation["extra_view_images"] = np.stack([image(t), image(50)])
    back = read_episode(dump(tmp_path / "a.pkl", episode), views=("extra_view_images",))
    np.testing.assert_array_equal(back.images["extra_view_images"][3], image(3))


def test_extra_view_of_none_is_no_view(tmp_path):
    episode = make_episode()
    for observation in episode["observations"]:
        observation["extra_view_images"] = None
    path = dump(tmp_path / "a.pkl", episode)
    assert list(read_episode(path, views=None).images) == ["main_images"]
    with pytest.raises(UserError, match=r"a\.pkl has no view extra_view_images; it has main_images"):
        read_episode(path, views=("extra_view_images",))


def without(key: str) -> dict:
    episode = make_episode()
    del episode[key]
    return episode


def with_image(index: int, value: object) -> dict:
    episode = make_episode()
    episode["observations"][index]["main_images"] = value
    return episode


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([1, 2], "holds a list where an episode's dict is expected"),
        (without("infos"), "lacks the key infos"),
        (make_episode(rewards=np.zeros(4)), "has rewards as ndarray, where a list is expected"),
        (make_episode(rewards=[0.0, 1.0]), "has 3 actions, 4 observations and 2 rewards"),
        (make_episode(infos=[{}] * 3), "has 3 actions, 4 observations and 4 rewards, .* 3 infos"),
        (make_episode(infos=[None] * 4), "has a NoneType among its infos"),
        (make_episode(rewards=[0.0, 1.0, 2.0, np.zeros(2)]), "has unusable rewards"),
        (make_episode(success=np.zeros(2)), "has unusable success"),
        (make_episode(actions=[np.zeros(2), np.zeros(2), np.zeros(3)]), "has unusable actions"),
        (
            with_image(1, image(0).astype(np.float32)),
            r"has main_images of float32 \(4, 6, 3\) in observation 1",
        ),
        (with_image(1, np.zeros((3, 4, 6), np.uint8)), r"has main_images of uint8 \(3, 4, 6\)"),
        (with_image(2, None), r"has main_images that differ within the episode: 3 x \(4, 6, 3\), 1 x none"),
    ],
)
def test_a_broken_episode_is_named_with_the_reason(tmp_path, content, reason):
    path = dump(tmp_path / "broken.pkl", content)
    with pytest.raises(UserError, match=rf"broken\.pkl {reason}"):
        read_episode(path)


def test_a_cut_file_is_named(tmp_path):
    path = write_episode(tmp_path, make_episode())
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=path.name):
        read_episode(path)


def test_list_episodes(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        list_episodes(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no episodes"):
        list_episodes(tmp_path)
    (tmp_path / "sub").mkdir()
    for name in ("b.pkl", "a.pkl", "sub/c.pkl", "a.txt"):
        (tmp_path / name).touch()
    assert list_episodes(tmp_path) == [tmp_path / "a.pkl", tmp_path / "b.pkl", tmp_path / "sub" / "c.pkl"]


# -----------------------------------------------------------------------------------------------------------
# Labels


def test_label_rule():
    infos = [
        {"success": True},  # the reset frame is a fail whatever its info says
        {"success": True},
        {"success": np.array([False]), "episode": {"success_once": True}},  # the frame's own word comes first
        {"episode": {"success_once": torch.tensor(True)}},
        {"other": 1},
    ]
    assert frame_labels(infos).tolist() == [False, True, False, True, False]


def test_another_label_has_no_second_source():
    infos = [{}, {"is_grasped": True, "success": False}, {"episode": {"success_once": True}}]
    assert frame_labels(infos, "is_grasped").tolist() == [False, True, False]


def test_a_label_that_nothing_mentions_is_not_taken_for_fail():
    with pytest.raises(ValueError, match="has no 'is_grasped' in its step infos, only elapsed, success"):
        frame_labels([{}, {"success": True, "elapsed": 1}], "is_grasped", required=True)


# -----------------------------------------------------------------------------------------------------------
# Writing


def test_what_readers_would_refuse_is_not_written(tmp_path):
    with pytest.raises(TypeError, match="cannot hold a PosixPath"):
        write_episode(tmp_path, make_episode(task=Path("x")))
    with pytest.raises(ValueError, match="lacks the reset entries"):
        write_episode(tmp_path, rlinf_episode(reset_entry=False) | {"step": 0})
    with pytest.raises(ValueError, match="has main_images that differ"):
        write_episode(tmp_path, with_image(0, None))
    assert list(tmp_path.iterdir()) == []


def test_tensors_are_written_as_numpy(tmp_path):
    path = write_episode(tmp_path, rlinf_episode(reset_entry=True) | {"step": 9})
    raw = pickle.loads(path.read_bytes())
    assert type(raw["observations"][0]["main_images"]) is np.ndarray
    assert type(raw["infos"][3]["episode"]["success_once"]) is np.ndarray


def test_writer_numbers_episodes_and_goes_on_after_a_restart(tmp_path):
    with EpisodeWriter(tmp_path) as writer:
        ids = [writer.put(make_episode(env_idx=env)) for env in (0, 1, 0)]
    assert ids == [0, 0, 1]
    assert writer.num_written == 3
    dump(tmp_path / "rank_0_env_1_episode_11_fail.pkl", make_episode())  # an older name counts too
    with EpisodeWriter(tmp_path) as writer:
        assert [writer.put(make_episode(env_idx=env)) for env in (0, 1, 2)] == [2, 12, 0]
    assert [(e.env_idx, e.episode_id) for e in map(read_episode, list_episodes(tmp_path))][:3] == [
        (0, 0),
        (0, 1),
        (0, 2),
    ]


def test_writer_flushes_when_the_caller_is_interrupted(tmp_path):
    with pytest.raises(KeyboardInterrupt), EpisodeWriter(tmp_path, max_pending=2) as writer:
        for _ in range(6):
            writer.put(make_episode())
        raise KeyboardInterrupt
    assert len(list_episodes(tmp_path)) == 6
    with pytest.raises(ValueError, match="closed"):
        writer.put(make_episode())


def test_writer_raises_the_threads_error_in_the_caller(tmp_path):
    with pytest.raises(ValueError, match="differ within the episode"), EpisodeWriter(tmp_path, 1) as writer:
        writer.put(with_image(0, None))
        for _ in range(3):  # more than may wait: a thread that had stopped would block us here
            writer._waiting.put(make_episode())
    assert not writer._thread.is_alive()


def test_a_full_disk_is_the_users_to_mend(tmp_path, monkeypatch):
    def full(folder, episode):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("common.episodes.write_episode", full)
    with (
        pytest.raises(UserError, match=r"cannot write episodes to .*No space left"),
        EpisodeWriter(tmp_path) as w,
    ):
        w.put(make_episode())


# -----------------------------------------------------------------------------------------------------------
# Image data sets


def payload(num: int = 5) -> RewardDatasetPayload:
    labels = [index % 2 for index in range(num)]
    metadata = {"view": "main_images", "render": {"fov": 0.85, "pose": [1.0, -2.5]}, "none": None, "ok": True}
    return RewardDatasetPayload([torch.from_numpy(image(index)) for index in range(num)], labels, metadata)


@pytest.mark.parametrize(
    "options", [{"weights_only": True}, {"weights_only": True, "mmap": True}, {"weights_only": False}]
)
def test_our_payload_is_a_plain_torch_file(tmp_path, options):
    saved = payload()
    saved.save(tmp_path / "train.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["train.pt"]
    back = torch.load(tmp_path / "train.pt", **options)
    assert list(back) == ["images", "labels", "metadata"]
    assert type(back["images"]) is list
    assert {(image.dtype, image.shape, image.is_contiguous()) for image in back["images"]} == {
        (torch.uint8, (4, 6, 3), True)
    }
    assert all(torch.equal(a, b) for a, b in zip(back["images"], saved.images, strict=True))
    assert back["labels"] == saved.labels
    data_hash = back["metadata"].pop("data_hash")
    assert len(data_hash) == 64
    assert back["metadata"] == saved.metadata
    assert zipfile.ZipFile(tmp_path / "train.pt").testzip() is None  # the check sums are right


def test_payload_round_trip_and_dataset(tmp_path):
    payload().save(tmp_path / "train.pt")
    dataset = RewardBinaryDataset(RewardDatasetPayload.load(tmp_path / "train.pt"))
    assert len(dataset) == 5
    frame, label = dataset[3]
    np.testing.assert_array_equal(frame, image(3))
    assert label == 1
    images, labels = next(iter(torch.utils.data.DataLoader(dataset, batch_size=4)))
    assert (images.shape, images.dtype, labels.tolist()) == ((4, 4, 6, 3), torch.uint8, [0, 1, 0, 1])


def test_the_references_payload_loads(tmp_path):
    reference = {"images": payload().images, "labels": [0, 1, 0, 1, 0], "metadata": {"random_seed": 42}}
    torch.save(reference, tmp_path / "train.pt")
    back = RewardDatasetPayload.load(tmp_path / "train.pt")
    assert torch.equal(back.images[4], reference["images"][4])
    assert (back.labels, back.metadata) == ([0, 1, 0, 1, 0], {"random_seed": 42})


def test_data_hash_sees_pixels_and_labels(tmp_path):
    def data_hash(frames: list[np.ndarray], labels: list[int]) -> str:
        with PayloadFile(tmp_path / "x.pt") as file:
            for frame in frames:
                file.add(frame)
            return file.finish(labels, {})

    frames = [image(0), image(1)]
    changed = [image(0), image(1)]
    changed[1][3, 5, 2] += 1
    variants = [(frames, [0, 1]), (frames, [1, 0]), (frames[::-1], [0, 1]), (changed, [0, 1])]
    assert len({data_hash(*variant) for variant in variants}) == 4
    assert data_hash(frames, [0, 1]) == data_hash([image(0), image(1)], [0, 1])


def test_payload_file_refuses_what_does_not_fit(tmp_path):
    with PayloadFile(tmp_path / "x.pt") as file:
        file.add(image(0))
        with pytest.raises(ValueError, match=r"like \(4, 6, 3\), got uint8 \(8, 6, 3\)"):
            file.add(image(0, (8, 6, 3)))
        with pytest.raises(ValueError, match="got float32"):
            file.add(image(0).astype(np.float32))
        with pytest.raises(ValueError, match="got 2 labels for 1 frames"):
            file.finish([0, 1], {})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"images": []}, "is no reward data set"),
        ({"images": [], "labels": [], "metadata": {}}, "holds 0 images and 0 labels"),
        (
            {"images": [torch.zeros(2, 2, 3, dtype=torch.uint8)], "labels": [2], "metadata": {}},
            "holds the label 2",
        ),
        (
            {"images": [torch.zeros(2, 2, 3)], "labels": [1], "metadata": {}},
            r"image torch.float32 \(2, 2, 3\)",
        ),
        (
            {"images": [torch.zeros(2, 2, 3, dtype=torch.bool)], "labels": [1], "metadata": {}},
            r"image torch.bool \(2, 2, 3\)",
        ),
    ],
)
def test_a_wrong_payload_is_named(tmp_path, content, reason):
    torch.save(content, tmp_path / "train.pt")
    with pytest.raises(UserError, match=rf"train\.pt .*{reason}"):
        RewardDatasetPayload.load(tmp_path / "train.pt")
