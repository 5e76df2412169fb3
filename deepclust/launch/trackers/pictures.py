"""What trackers show of a round: a picture of its largest clusters, and rows with their images."""

from __future__ import annotations

import io

import numpy as np
from jaxtyping import Float32, Int64, UInt8
from PIL import Image

from deepclust.data.read.image_files import open_images
from deepclust.data.shards.index import Index
from deepclust.run.directory import Run, has_file, is_done
from deepclust.run.round_files import read_array, read_assignments
from deepclust.stages.data_index import open_data_index
from deepclust.world import generator

CLUSTERS, EACH, SIDE = 8, 8, 64  # rows of the picture, images in each, pixels of an image
MOST, SPRITE = 1000, 32  # rows for the projector, pixels of each image


def of_clusters(run: Run, number: int) -> Image.Image:
    """Return a round's largest clusters, a row of the images nearest to the centroid for each."""
    clusters = read_assignments(run, number)[0]
    distances = read_array(run.round(number) / "assignments", "distances.npy", dims=2)[0]
    sizes = np.bincount(clusters[clusters >= 0])
    picture = Image.new("RGB", (EACH * SIDE, CLUSTERS * SIDE))
    index = open_data_index(run.recipe.data, run.path, build=False)
    for row, cluster in enumerate(np.argsort(-sizes, kind="stable")[:CLUSTERS]):
        members = np.flatnonzero(clusters == cluster)
        nearest = members[np.argsort(distances[members], kind="stable")][:EACH]
        for column, image in enumerate(_images(index, nearest, SIDE, run.recipe.data.max_pixels)):
            picture.paste(Image.fromarray(image), (column * SIDE, row * SIDE))
    return picture


def sample(
    run: Run,
) -> tuple[Float32[np.ndarray, "m d"], list[list[str]], UInt8[np.ndarray, "m s s 3"]] | None:
    """Return rows of the last round, their cluster, label and id, and their images.

    Return None where its features are not on disk.
    """
    rounds = run.rounds()
    stage = run.round(rounds[-1] if rounds else 0) / "features"
    if not rounds or not is_done(stage) or not has_file(stage, "rows.npy"):
        return None
    rows, clusters = read_array(stage, "rows.npy", dims=2), read_assignments(run, rounds[-1])[0]
    known = np.flatnonzero(clusters >= 0)
    draw = generator(rounds[-1], "track", "projector")
    ids = np.sort(draw.choice(known, min(MOST, len(known)), replace=False))
    index = open_data_index(run.recipe.data, run.path, build=False)
    labels = np.full(len(index), -1) if index.labels is None else index.labels
    words = [[str(clusters[one]), str(labels[one]), str(one)] for one in ids]
    images = _images(index, ids, SPRITE, run.recipe.data.max_pixels)
    return np.asarray(rows[ids], np.float32), words, images


def _images(
    index: Index, sample_ids: Int64[np.ndarray, " m"], side: int, most: int
) -> UInt8[np.ndarray, "m s s 3"]:
    """Return images as squares, black where one cannot be read.

    Pillow alone reads them: importing torchvision takes longer than all of this.
    """
    squares = np.zeros((len(sample_ids), side, side, 3), np.uint8)
    files = open_images(index, patience_s=2.0)
    try:
        for square, *place in zip(squares, *index.locate(sample_ids), strict=True):
            try:
                image = Image.open(io.BytesIO(files.read(*map(int, place))))
                if image.width * image.height <= most:
                    square[:] = np.asarray(image.convert("RGB").resize((side, side)))
            except (OSError, ValueError, SyntaxError):  # what Pillow raises for a damaged file
                continue
    finally:
        files.close()
    return squares
