"""Images and ImageData: uint8 pictures in memory, in a mapped file or decoded on demand, behind one interface.

A *canvas* is a uint8 image [C, S, S] into which a whole picture was resized; its original height and width stand
beside it, so that crops can be drawn in the geometry of the original. A square picture of side S is its own canvas.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from twoviews.data.decoding import Decoded
from twoviews.errors import BadInput
from twoviews.randomness import generator

RAM_LIMIT = 2 * 10**9  # bytes of pixels that are read into memory whole on a CPU; more stays a mapped file


def sent(x: Tensor, device: torch.device) -> Tensor:
    """`x` on a device; a copy to a GPU is made when its turn comes there, and nobody waits for it."""
    if device.type == "cuda" and not x.is_cuda:
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


@dataclass(frozen=True)
class Images:
    """One split of a data set."""

    pixels: UInt8[Tensor, "N C S S"] | Decoded
    sizes: Int[Tensor, "N 2"]  # original height and width in px
    labels: Int[Tensor, " N"] | None  # 0..classes-1
    paths: list[str] | None = None  # of the picture files, where they are files

    def __len__(self) -> int:
        return len(self.sizes)

    def batches(
        self, batch_size: int, index: Int[Tensor, " n"] | None = None
    ) -> Iterator[tuple[UInt8[Tensor, "b C S S"], Int[Tensor, "b 2"], Int[Tensor, " b"]]]:
        """Canvases, original sizes and index of each batch, in the order of `index` (default: all, from the first).

        The last batch is as short as it comes out, never left out. Canvases lie where `pixels` does; sizes and
        index on the CPU.
        """
        rows = torch.arange(len(self)) if index is None else index
        parts = rows.split(batch_size) if len(rows) else ()
        if isinstance(self.pixels, Decoded):
            canvases = self.pixels.batches(parts)
        elif index is None:
            canvases = self.pixels.split(batch_size)
        else:
            # pixels[part] is the same and was measured to take 4.5 times as long on a CPU.
            canvases = (self.pixels.index_select(0, part) for part in sent(rows, self.pixels.device).split(batch_size))
        for canvas, part in zip(canvases, parts, strict=False):
            yield canvas, self.sizes[part], part

    def subset(self, index: Int[Tensor, " n"]) -> "Images":
        """The images of these rows, in this order."""
        pixels = self.pixels.subset(index) if isinstance(self.pixels, Decoded) else self.pixels[index]
        labels = None if self.labels is None else self.labels[index]
        paths = None if self.paths is None else [self.paths[row] for row in index.tolist()]
        return Images(pixels, self.sizes[index], labels, paths)


@dataclass(frozen=True)
class ImageData:
    """A data set: its splits, and the facts about it that other parts depend on."""

    name: str
    train: Images
    memory: Images | None  # labelled; the bank of kNN and the training set of the linear probe
    test: Images | None  # labelled; there whenever memory is, and only then
    classes: tuple[str, ...]  # names by label; () without labels
    channels: int
    size: int  # S, side of the canvas in px
    mean: tuple[float, ...]  # per channel, of the training pixels in [0, 1]
    std: tuple[float, ...]
    digest: str  # of the content: equal digest, equal pixels, sizes, labels and splits
    notes: tuple[str, ...]  # sentences that the user should read before the run starts
    resident_bytes: int = 0  # of pixels that `to` has put into the memory of a device

    def with_train_images(self, count: int | None) -> "ImageData":
        """The data with only this many training images, which keep the shares of the classes; unchanged for None.

        Raises:
            BadInput: there are fewer training images.
        """
        if count is None:
            return self
        total = len(self.train)
        if count > total:
            raise BadInput(f"train_images={count} is more than there are: at most {total}, or null for all.")
        train = self.train.subset(stratified(self.train.labels, total, count))
        note = f"Training on {count} of {total} images; memory and test stay whole."
        digest = hashlib.blake2b(f"{self.digest} {count}".encode(), digest_size=16).hexdigest()
        return replace(self, train=train, digest=digest, notes=(*self.notes, note))

    def to(self, device: torch.device | str) -> "ImageData":
        """The same data with their pixels in the memory of `device`, where they fit.

        On a GPU they may take half of the memory that is free, on a CPU `RAM_LIMIT`; what does not fit stays where
        it is, and batches of it are copied one by one.
        """
        place = torch.device(device)
        limit = torch.cuda.mem_get_info(place)[0] // 2 if place.type == "cuda" else RAM_LIMIT
        free = limit
        moved: dict[int, Images] = {}  # train and memory are often one and the same
        for images in (self.train, self.memory, self.test):
            if images is None or isinstance(images.pixels, Decoded) or id(images) in moved:
                continue
            if images.pixels.nbytes <= free:
                free -= images.pixels.nbytes
                # On a CPU a mapped file is copied too: reading it piece by piece from a slow disk stalls steps.
                pixels = images.pixels.to(place, copy=True)
                moved[id(images)] = replace(images, pixels=pixels)
        splits = {"train": self.train, "memory": self.memory, "test": self.test}
        placed = {key: moved.get(id(images), images) for key, images in splits.items()}
        return replace(self, **placed, resident_bytes=limit - free)


class UnlabelledImages(BadInput):
    """Accuracy is asked for on images that have no labels; `data` is the name of the data set."""

    def __init__(self, data: str):
        super().__init__(
            f"{data} has no labelled training and test images, and accuracy cannot be measured; put them into train/<class>/ "
            "and test/<class>/, or choose a protocol without labels, such as embed or map."
        )


def stratified(labels: Int[Tensor, " N"] | None, total: int, count: int) -> Int[Tensor, " n"]:
    """Sorted index of `count` of `total` images with the shares of the classes kept, the same on every call.

    Each class gives its share rounded down; what is missing then comes from the largest remainders.
    """
    order = torch.randperm(total, generator=generator("stratified", total))
    if labels is None:
        return order[:count].sort().values
    members = torch.bincount(labels)
    quota = members * count // total
    remainder = members * count % total
    quota[remainder.argsort(descending=True, stable=True)[: count - int(quota.sum())]] += 1
    shuffled = labels[order]
    parts = [order[shuffled == label][: int(quota[label])] for label in range(len(members))]
    return torch.cat(parts).sort().values
