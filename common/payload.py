"""Image data sets: labelled frames, as `preprocess_resnet.py` writes them and `train_resnet.py` reads them.

`train.pt` or `val.pt`: `{"images": list of uint8 tensors (H, W, 3), "labels": list of int
(1 success, 0 fail), "metadata": dict}`, for plain `torch.load(weights_only=True)`. All images view one
storage. Frames that show several cameras at once are (V, H, W, 3), in the order of `metadata["views"]`.
`metadata["frame_episodes"]` and `["frame_steps"]` say for each frame which episode it is from (a number) and
which of its frames; files of RLinf lack them.
"""

import hashlib
import math
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.files import atomic_write, load_torch
from common.runtime import UserError

if TYPE_CHECKING:  # importing torch costs 0.5 GB and seconds, and most of this module never needs it
    import torch


class PayloadFile:
    """A `train.pt` or `val.pt` written frame by frame, so that a data set need not fit into memory.

    Such a file is an uncompressed zip archive in a layout that torch documents ("Serialized file format for
    torch.save"): the numbers of a storage in `data/<key>`, the pickled structure around them in `data.pkl`.
    The order of the entries is free, so the frames go first and what is known only in the end (labels, hash)
    after them. Needs no torch. A context manager; the file is complete after `finish`.
    """

    def __init__(self, path: str | Path):
        self._zip = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED)
        # zip64 always: a storage may exceed 2 GiB, and which it will is unknown here
        self._storage = self._zip.open("payload/data/0", "w", force_zip64=True)
        self._image_shape: tuple[int, ...] | None = None
        self._num_frames = 0

    def add(self, frame: np.ndarray) -> None:
        """Append one uint8 frame, ([V,] H, W, 3). Raises ValueError unless all frames have one shape."""
        fits = frame.dtype == np.uint8 and frame.ndim in (3, 4)
        if not fits or frame.shape != (self._image_shape or frame.shape):
            wanted = f"uint8 ([V,] H, W, 3) like {self._image_shape}"
            raise ValueError(f"expected {wanted}, got {frame.dtype} {frame.shape}")
        self._image_shape = frame.shape
        self._num_frames += 1
        self._storage.write(np.ascontiguousarray(frame).reshape(-1).data)

    def finish(self, labels: list[int], metadata: dict) -> str:
        """Write the rest. Returns `data_hash`, which joins the metadata.

        It is a SHA-256 over the CRC-32 of all frames, which the archive holds anyway, and the labels. It
        finds mistakes; a hash that finds forgeries would take as long as reading the frames.
        """
        if len(labels) != self._num_frames or not labels:
            raise ValueError(f"got {len(labels)} labels for {self._num_frames} frames")
        self._storage.close()
        checksum = self._zip.getinfo("payload/data/0").CRC
        data_hash = hashlib.sha256(checksum.to_bytes(4, "little") + bytes(labels)).hexdigest()
        structure = _payload_pickle(labels, {**metadata, "data_hash": data_hash}, self._image_shape)
        for name, content in (("data.pkl", structure), ("byteorder", b"little"), ("version", b"3\n")):
            self._zip.writestr(f"payload/{name}", content)
        self._zip.close()
        return data_hash

    def __enter__(self) -> "PayloadFile":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._storage.close()
        self._zip.close()


def _payload_pickle(labels: list[int], metadata: dict, image_shape: tuple[int, ...]) -> bytes:
    """The `data.pkl` that `torch.save` would write for images that are views of storage "0".

    Spelled in opcodes, because `pickle` writes no name (`torch.ByteStorage`) without importing its module.
    """

    def part(value: Any) -> bytes:  # without the opcodes that open (PROTO 2) and close (STOP) a pickle
        return pickle.dumps(value, protocol=2)[2:-1]

    strides = tuple(math.prod(image_shape[axis + 1 :]) for axis in range(len(image_shape)))
    image_size = math.prod(image_shape)
    storage = (
        pickle.MARK + part("storage") + pickle.GLOBAL + b"torch\nByteStorage\n"
        + part("0") + part("cpu") + part(len(labels) * image_size) + pickle.TUPLE + pickle.BINPERSID
    )  # fmt: skip
    before_offset = pickle.GLOBAL + b"torch._utils\n_rebuild_tensor_v2\n" + pickle.MARK + storage
    after_offset = (
        part(tuple(image_shape)) + part(strides) + pickle.NEWFALSE  # no gradient
        + pickle.GLOBAL + b"collections\nOrderedDict\n" + pickle.EMPTY_TUPLE + pickle.REDUCE  # no hooks
        + pickle.TUPLE + pickle.REDUCE
    )  # fmt: skip
    images = b"".join(before_offset + part(index * image_size) + after_offset for index in range(len(labels)))
    return (
        pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + pickle.MARK
        + part("images") + pickle.EMPTY_LIST + pickle.MARK + images + pickle.APPENDS
        + part("labels") + part(labels)
        + part("metadata") + part(metadata)
        + pickle.SETITEMS + pickle.STOP
    )  # fmt: skip


@dataclass
class RewardDatasetPayload:
    """The content of `train.pt` or `val.pt`."""

    images: list["torch.Tensor"]  # (H, W, 3) uint8 each, of several views (V, H, W, 3)
    labels: list[int]  # 1 success, 0 fail
    metadata: dict[str, Any]

    def save(self, path: str | Path) -> None:
        """Write to `path`, whole or not at all. Raises ValueError without images or if their sizes differ."""
        with atomic_write(path) as temporary, PayloadFile(temporary) as file:
            for image in self.images:
                file.add(image.numpy())
            file.finish(self.labels, self.metadata)

    @classmethod
    def load(cls, path: str | Path) -> "RewardDatasetPayload":
        """Read `path`, ours or RLinf's; images stay on the disk until touched. Raises UserError if broken."""
        import torch

        data = load_torch(path, mmap=True)
        if not isinstance(data, dict) or not {"images", "labels", "metadata"} <= data.keys():
            raise UserError(f"{path} is no reward data set: expected a dict of images, labels and metadata")
        images, labels = data["images"], [int(label) for label in data["labels"]]
        if len(images) != len(labels) or not images:
            raise UserError(
                f"{path} holds {len(images)} images and {len(labels)} labels; expected one label per image"
            )
        if wrong := set(labels) - {0, 1}:
            raise UserError(f"{path} holds the label {min(wrong)}; expected 0 (fail) or 1 (success)")
        for image in images:
            if image.dtype != torch.uint8 or image.dim() not in (3, 4) or image.shape[-1] != 3:
                raise UserError(
                    f"{path} holds an image {image.dtype} {tuple(image.shape)}; need uint8 (H, W, 3)"
                )
        return cls(images, labels, data["metadata"])

    @property
    def views(self) -> list[str]:
        """The cameras in each frame; files of one camera need not name it."""
        return self.metadata.get("views", [self.metadata.get("view", "main_images")])


class RewardBinaryDataset:
    """(image ([V,] H, W, 3) uint8 tensor, label 0 or 1) per frame, for a `DataLoader`.

    Not derived from torch's `Dataset`, which would add nothing to the two methods but the import of torch.
    """

    def __init__(self, payload: RewardDatasetPayload):
        self.payload = payload

    def __len__(self) -> int:
        return len(self.payload.labels)

    def __getitem__(self, index: int) -> tuple["torch.Tensor", int]:
        return self.payload.images[index], self.payload.labels[index]
