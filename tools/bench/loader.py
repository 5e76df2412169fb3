"""Images per second of our training loader against those of other libraries, on a CPU.

    python tools/bench/loader.py --photos imagenette96.tar.xz --fashion FOLDER --out loader.json

All have the same images, crops (random resized crop, flip, normalise), final float tensors and
number of worker processes or threads.

- `ours` samples uniformly over Zipf-sized clusters, from shards.
- `imagefolder` is torchvision's ImageFolder with Pillow and its v1 transforms in a DataLoader, as
  DeepCluster and most training scripts use it.
- `webdataset` is its stock pipeline (shuffle 1000) with torchvision's native decoder and v2
  transforms on uint8, on the same shards.
- `dali` is NVIDIA's reader of folders with its operators for a CPU, which decodes only the crop.
- `spdl` is Meta's pipeline of threads, in which FFmpeg decodes, crops and resizes.

The last two run where they are installed (nvidia-dali-cuda120; spdl with FFmpeg's libraries). FFCV
does not build from its package here. Each run is a separate process, and the contenders take turns.
On a machine with other users only the ratios within one turn are reliable. The clock runs from the
first batch to the last. Photos of more than 96 pixels are small ones made larger, JPEG quality 90.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SETS = {
    "photos 500x375": ("large", 224), "photos 256": ("medium", 224), "photos 96": ("small", 96),
    "fashion 28": ("fashion", 28),
}  # fmt: skip
BATCH = 64


def write_folder(folder: Path, images: Iterator[tuple[str, str, bytes]]) -> None:
    """Write (class, file name, bytes) in the ImageFolder convention."""
    for label, name, data in images:
        (folder / label).mkdir(parents=True, exist_ok=True)
        (folder / label / name).write_bytes(data)


def photos(archive: Path, count: int, size: tuple[int, int] | None) -> Iterator[tuple]:
    """Yield the first `count` training photos of a tar, as they are or made larger."""
    with tarfile.open(archive) as tar:
        for member in tar:
            if not (member.name.startswith("train/") and member.isfile()):
                continue
            data = tar.extractfile(member).read()
            if size is not None:
                buffer = io.BytesIO()
                large = Image.open(io.BytesIO(data)).convert("RGB").resize(size, Image.BICUBIC)
                large.save(buffer, "JPEG", quality=90)
                data = buffer.getvalue()
            yield member.name.split("/")[1], Path(member.name).name, data
            count -= 1
            if count == 0:
                return


def garments(folder: Path, count: int) -> Iterator[tuple]:
    """Yield the first `count` Fashion-MNIST images as grey PNG."""
    images = gzip.decompress((folder / "train-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / "train-labels-idx1-ubyte.gz").read_bytes())
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
    for i in range(count):
        buffer = io.BytesIO()
        Image.fromarray(pixels[i]).save(buffer, "PNG")
        yield str(labels[8 + i]), f"{i:05d}.png", buffer.getvalue()


def prepare(work: Path, options: argparse.Namespace) -> list[str]:
    """Write every data set as a folder and as shards; return the names of those there are."""
    from deepclust.data.pack.pack import pack

    sources = {}
    if options.photos:
        sources["large"] = photos(options.photos, options.count, (500, 375))
        sources["medium"] = photos(options.photos, options.count, (341, 256))
        sources["small"] = photos(options.photos, options.count, None)
    if options.fashion:
        sources["fashion"] = garments(options.fashion, 10_000)
    for name, images in sources.items():
        if not (work / name / "shards").exists():
            write_folder(work / name / "folder", images)
            pack(work / name / "folder", work / name / "shards")
    return [title for title, (name, _) in SETS.items() if name in sources]


def ours(data: Path, size: int, workers: int) -> Iterator:
    """Yield batches of our loader: uniform over Zipf-sized clusters, by offset from shards."""
    from deepclust.data.images.crops import Crop, RandomResizedCrop, to_float
    from deepclust.data.plan import EpochPlan
    from deepclust.data.read.loader import Loader, Request
    from deepclust.data.shards.index import open_index

    index = open_index(data / "shards")
    weights = 1 / np.arange(1, len(index) // 10)
    labels = np.random.default_rng(0).choice(len(weights), len(index), p=weights / weights.sum())
    assignments = data / "assignments.npy"
    np.save(assignments, labels.astype(np.int32))
    plan = EpochPlan.build(labels, seed=0, epoch=0, global_batch=BATCH)
    crops, loader = (Crop(RandomResizedCrop(size)),), Loader(index, workers, read="offset")
    rows = zip(plan.for_rank(0, 1), plan.positions.reshape(-1, BATCH), strict=True)
    for loaded in loader.stream(Request(i, at, 0, crops, assignments) for i, at in rows):
        yield to_float(loaded.images[0], MEAN, STD)
    loader.close()


def imagefolder(data: Path, size: int, workers: int) -> Iterator:
    """Yield batches of ImageFolder with Pillow and torchvision's v1 transforms."""
    from torch.utils.data import DataLoader
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    steps = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    steps += [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    images = ImageFolder(str(data / "folder"), transforms.Compose(steps))
    for batch, _ in DataLoader(images, BATCH, shuffle=True, num_workers=workers, drop_last=True):
        yield batch


class Decode:
    """torchvision's native decoder and v2 transforms on uint8, float last: for webdataset."""

    def __init__(self, size: int) -> None:
        import torch
        from torchvision.transforms import v2

        crop = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
        self.views = v2.Compose(
            [*crop, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
        )

    def __call__(self, sample: tuple[bytes]):
        import torch
        from torchvision.io import ImageReadMode, decode_image

        data = torch.frombuffer(bytearray(sample[0]), dtype=torch.uint8)
        return self.views(decode_image(data, ImageReadMode.RGB))


def webdataset(data: Path, size: int, workers: int) -> Iterator:
    """Yield batches of the stock webdataset pipeline on the same shards."""
    import torch
    import webdataset as wds

    torch.set_num_threads(1)
    urls = sorted(str(path) for path in (data / "shards").glob("*.tar"))
    images = wds.WebDataset(urls, shardshuffle=100, seed=0).shuffle(1000).to_tuple("jpg;jpeg;png")
    images = images.map(Decode(size)).batched(BATCH, collation_fn=torch.stack, partial=False)
    yield from wds.WebLoader(images, batch_size=None, num_workers=workers)


def dali(data: Path, size: int, workers: int) -> Iterator:
    """Yield batches of DALI's pipeline on a CPU, with `workers` threads."""
    import torch
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def
    def images() -> tuple:
        files, labels = fn.readers.file(
            file_root=str(data / "folder"), random_shuffle=True, name="files"
        )
        boxes = {"random_area": [0.08, 1.0], "random_aspect_ratio": [3 / 4, 4 / 3]}
        crops = fn.decoders.image_random_crop(files, output_type=types.RGB, **boxes)
        crops = fn.resize(crops, size=[size, size])
        mean, std = ([255 * x for x in numbers] for numbers in (MEAN, STD))
        flip = fn.random.coin_flip()
        return fn.crop_mirror_normalize(crops, mean=mean, std=std, mirror=flip), labels

    pipeline = images(batch_size=BATCH, num_threads=workers, device_id=None)
    pipeline.build()
    for _ in range(pipeline.epoch_size("files") // BATCH):
        batch, _ = pipeline.run()
        yield torch.from_numpy(np.array(batch.as_tensor()))


def spdl(data: Path, size: int, workers: int) -> Iterator:
    """Yield batches of SPDL's pipeline, with `workers` threads."""
    import spdl.io
    import torch
    from spdl.pipeline import PipelineBuilder

    from deepclust.data.images.crops import RandomResizedCrop, to_float

    torch.set_num_threads(1)
    files = sorted(str(path) for path in (data / "folder").rglob("*.*"))
    order = np.random.default_rng(0).permutation(len(files))
    view = RandomResizedCrop(size)
    draws = view.draws(0, np.arange(len(files)))

    def cropped(i: int) -> torch.Tensor:
        packets = spdl.io.demux_image(files[i])
        top, left, height, width = view.box(packets.height, packets.width, draws[i])
        flip = "hflip," if draws[i][-1] else ""
        steps = f"crop={width}:{height}:{left}:{top},scale={size}:{size}:flags=bilinear,{flip}"
        frames = spdl.io.decode_packets(packets, filter_desc=f"{steps}format=pix_fmts=rgb24")
        return torch.from_numpy(np.array(spdl.io.convert_frames(frames))).permute(2, 0, 1)

    def batched(crops: list[torch.Tensor]) -> torch.Tensor:
        return to_float(torch.stack(crops), MEAN, STD)

    steps = PipelineBuilder().add_source(order.tolist()).pipe(cropped, concurrency=workers)
    steps = steps.aggregate(BATCH, drop_last=True).pipe(batched).add_sink(4)
    pipeline = steps.build(num_threads=workers)
    with pipeline.auto_stop():
        yield from pipeline


CONTENDERS: dict[str, Callable[[Path, int, int], Iterator]] = {
    "ours": ours,
    "imagefolder": imagefolder,
    "webdataset": webdataset,
    "dali": dali,
    "spdl": spdl,
}
MODULES = {"dali": "nvidia.dali", "spdl": "spdl.io"}  # of those that may be missing


def installed(name: str) -> bool:
    """Return whether a contender can run here."""
    try:
        return name not in MODULES or importlib.util.find_spec(MODULES[name]) is not None
    except ImportError:
        return False


def race(name: str, data: Path, size: int, workers: int) -> float:
    """Images per second of one contender over one epoch, from its first batch on."""
    warnings.simplefilter("ignore")
    batches = CONTENDERS[name](data, size, workers)
    first = next(batches)
    assert first.shape[1:] == (3, size, size), first.shape
    assert str(first.dtype) == "torch.float32"
    began, count = time.perf_counter(), 0
    for batch in batches:
        count += len(batch)
    return count / (time.perf_counter() - began)


def run(name: str, data: Path, size: int, workers: int) -> float:
    """Run `race` in a separate process."""
    command = [sys.executable, __file__, "--race", name, str(data), str(size), str(workers)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def compare(work: Path, title: str, workers: int, repeats: int) -> dict:
    """Let the contenders take turns on one data set; medians, and medians of paired ratios."""
    name, size = SETS[title]
    speeds = {contender: [] for contender in CONTENDERS if installed(contender)}
    for _ in range(repeats):
        for contender, own in speeds.items():
            own.append(run(contender, work / name, size, workers))
    row = {"set": title, "workers": workers, "speeds": speeds}
    for contender, values in speeds.items():
        row[contender] = median(values)
        row[f"ours / {contender}"] = median(np.array(speeds["ours"]) / values)
    return row


def main() -> None:
    """Prepare, compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--photos", type=Path, help="tar of train/CLASS/NAME.jpg")
    parser.add_argument("--fashion", type=Path, help="folder of Fashion-MNIST's idx.gz files")
    parser.add_argument("--count", type=int, default=4000, help="photos to use")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, help="where to keep the prepared images")
    parser.add_argument("--only", choices=list(SETS), help="one of the data sets")
    parser.add_argument("--out", type=Path, default=Path("/tmp/bench-loader.json"))
    parser.add_argument("--race", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.race:
        name, data, size, workers = options.race
        print(race(name, Path(data), int(size), int(workers)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        names = [n for n in prepare(work, options) if options.only in (None, n)]
        rows = [compare(work, t, w, options.repeats) for t in names for w in options.workers]
    names = [name for name in CONTENDERS if installed(name)]
    print("| images/s (ours is so many times as fast) | workers | " + " | ".join(names) + " |")
    print("|---" * (2 + len(names)) + "|")
    for row in rows:
        cells = [f"{row[name]:.0f} ({row[f'ours / {name}']:.2f})" for name in names]
        print(f"| {row['set']} | {row['workers']} | " + " | ".join(cells) + " |")
    options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
