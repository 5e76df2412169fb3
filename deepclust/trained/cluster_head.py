"""Which cluster an image is in, as a module that can be exported (`labelling.py` is the reference).

`ClusterHead` goes from a row to its cluster: pivot, whitening and unit length as in extraction,
then the rule of the round. `ImagesToClusters` has the network before it. Both trace as one graph
without branches on values, so ONNX and torch.export hold them whole. Distances are those of
`deepclust predict`, computed in float32 without its exact search. So rows whose nearest centroids
are nearly as far as each other (`TIES`) may get the other one.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn

from deepclust.errors import DataError
from deepclust.methods.base import Method
from deepclust.trained.labelling import Answers, Balanced, Nearest, Projection, Rule
from deepclust.trained.trained_run import Labeller

TIES = 2e-2  # a smaller margin: kernels that sum in another order may decide otherwise
OUTPUTS = ("clusters", "distances", "margins")
FEATURES, ACTIVATION, OWN = "features", "activation", "own"  # what rows are of the network
LARGEST = 2**20  # clusters


class Found(NamedTuple):
    """The clusters of some rows: [b], or [b, heads] where a run has several clusterings.

    Margins are NaN where there is one cluster only.
    """

    clusters: Int64[Tensor, " *b"]
    distances: Float32[Tensor, " *b"]
    margins: Float32[Tensor, " *b"]


class ClusterHead(nn.Module):
    """Rows of a network [b, D] to clusters, distances and margins.

    `about` holds everything but tensors: `rule`, `rows`, `heads`, `names` and the switches of the
    projection. `names` has the class of each cluster of head 0, or "cluster J".
    """

    pivot: Tensor
    mean: Tensor
    matrix: Tensor | None
    supers: Tensor | None

    def __init__(self, about: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.about = about
        self.names = [str(name) for name in about["names"]]
        for name in TENSORS:
            self.register_buffer(name, tensors.get(name))
        self.find = RULES[about["rule"]]

    def forward(self, rows: Float[Tensor, "b D"]) -> Found:
        """Return the clusters of features (`rows` of `about`: or of their activation)."""
        if self.about["rows"] == ACTIVATION:
            rows = rows.relu()
        return self.of_rows(rows)

    def of_rows(self, rows: Float[Tensor, "b D"]) -> Found:
        """Return the clusters of what a round is made of."""
        rows = self.projected(rows.float())
        parts = [Found(*self.find(self, rows, head)) for head in range(self.about["heads"])]
        if len(parts) == 1:
            return parts[0]
        return Found(*(torch.stack(values, 1) for values in zip(*parts, strict=True)))

    def projected(self, rows: Float32[Tensor, "b D"]) -> Float32[Tensor, "b d"]:
        """Return rows as `labelling.Projection` has them, with its roundings."""
        if self.about["rule"] == "answers":
            return rows
        rows = (rows - self.pivot).half().float() + self.pivot
        if self.matrix is not None:
            wide = (rows.to(self.mean.dtype) - self.mean) * self.about["scale"]
            rows = unit(wide.float() @ self.matrix)
        elif self.about["unit"]:
            rows = unit(rows)
        return rows.half().float()

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, for a file."""
        return {name: tensor.contiguous() for name, tensor in self.named_buffers()}


class ImagesToClusters(nn.Module):
    """Normalised images [b, 3, h, w] to clusters, distances and margins."""

    def __init__(self, method: Method, head: ClusterHead) -> None:
        super().__init__()
        self.image_size, self.name = method.trunk.image_size, method.trunk.name
        self.head, self.rows = head, str(head.about["rows"])
        self.network: nn.Module = method.trunk if self.rows in (FEATURES, ACTIVATION) else method

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the clusters of normalised images; torch.export stores plain tuples alone."""
        clusters, distances, margins = self._found(images)
        return clusters, distances, margins

    def _found(self, images: Float[Tensor, "b 3 h w"]) -> Found:
        if not isinstance(self.network, Method):
            found: Found = self.head(self.network(images))
            return found
        if self.head.about["rule"] == "answers":
            return self.head.of_rows(self.network.answer(self.network.embed(images)))
        return self.head.of_rows(self.network.clustered(images))


def cluster_head_of(labeller: Labeller) -> ClusterHead:
    """Return the rule of a run as a module, on the CPU."""
    rule, projection = labeller.rule, labeller.projection
    about, tensors = _rule_parts(rule)
    classes = labeller.classes
    named = [None if classes is None else classes[j] for j in range(rule.k)]
    about |= {
        "rows": _rows_of(labeller.embedder.method, about["rule"]),
        "heads": rule.heads, "round": labeller.round,
        "names": [f"cluster {j}" if name is None else str(name) for j, name in enumerate(named)],
    }  # fmt: skip
    if projection is not None:
        more, parts = _projection_parts(projection, labeller.dim)
        about, tensors = about | more, tensors | parts
    return ClusterHead(about, tensors).eval()


def images_to_clusters(method: Method, head: ClusterHead) -> ImagesToClusters:
    """Return network and rule as one module, a copy in float32 on the CPU."""
    plain = copy.deepcopy(method).cpu().float().eval().requires_grad_(False)
    return ImagesToClusters(plain.to(memory_format=torch.contiguous_format), head).eval()


def cluster_head_from(about: dict[str, Any], tensors: dict[str, Tensor]) -> ClusterHead:
    """Return the head that a file describes, which may come from anybody.

    Raises `DataError` where it does not fit together.
    """
    try:
        head = ClusterHead(about, tensors).eval()
        width = int(about["dim"])
        if set(tensors) - set(TENSORS) or not 0 < len(head.names) <= LARGEST:
            raise ValueError("it has other tensors, or too many clusters")
        with torch.no_grad():
            found = head(torch.zeros(1, width))
        if len(found.clusters) != 1:
            raise ValueError(f"it gives {len(found.clusters)} clusters of one row")
    except Exception as error:  # a forged header says anything
        raise DataError(f"its clusters cannot be built: {str(error)[:300]}") from error
    return head


def unit(rows: Float32[Tensor, "b d"]) -> Float32[Tensor, "b d"]:
    """Scale rows to unit length; a row of zeros stays one."""
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / torch.where(norms == 0, 1.0, norms)


@torch.no_grad()
def _rows_of(method: Method, rule: str) -> str:
    """Return what the rows of a method are, as two random images show."""
    if rule == "answers":
        return OWN
    random, trunk = torch.Generator().manual_seed(0), method.trunk
    size, device = trunk.image_size, next(trunk.parameters()).device
    images = torch.randn(2, 3, size, size, generator=random).to(device)
    rows, features = method.clustered(images), trunk(images)
    if rows.shape == features.shape and torch.equal(rows, features):
        return FEATURES
    is_active = rows.shape == features.shape and torch.equal(rows, features.relu())
    return ACTIVATION if is_active else OWN


def _projection_parts(projection: Projection, dim: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    pivot = torch.zeros(dim) if projection.pivot is None else torch.from_numpy(projection.pivot)
    about: dict[str, Any] = {"unit": projection.unit, "scale": 1.0, "dim": dim}
    tensors = {"pivot": pivot.float()}
    if (whitening := projection.whitening) is not None:
        about["scale"] = float(whitening.scale)
        tensors["mean"] = torch.from_numpy(whitening.mean)
        tensors["matrix"] = torch.from_numpy(whitening.matrix)
    return about, tensors


def _rule_parts(rule: Rule) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what a rule is, and its tensors by the names of `TENSORS`."""
    if isinstance(rule, Nearest):
        tensors = {"centroids": rule.centroids}
        if rule.supers is not None:
            tensors["supers"] = rule.supers
        return {"rule": "nearest", "spherical": bool(rule.spherical)}, tensors
    if isinstance(rule, Balanced):
        names = ("weight", "bias", "scalings")
        about = {"rule": "balanced", "sharpness": float(rule.sharpness)}
        return about, {name: getattr(rule, name) for name in names}
    assert isinstance(rule, Answers)
    return {"rule": "answers", "dim": rule.k}, {}


def _nearest(own: ClusterHead, rows: Tensor, head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the nearest centroid, in two levels that of the nearest super-cluster."""
    centroids: Tensor = own.get_buffer("centroids")[head]
    scaled = unit(rows) if own.about["spherical"] else rows
    if own.supers is None:
        costs = _squares(scaled, centroids)
        return _best(costs, costs)
    supers = own.supers[head]
    each = len(centroids) // len(supers)
    empty = ~centroids.any(1)
    costs = _squares(rows, centroids).masked_fill(empty, torch.inf)
    chosen = _squares(scaled, supers).argmin(1)
    owner = torch.arange(len(centroids), device=rows.device) // each
    inside = costs.masked_fill(owner[None] != chosen[:, None], torch.inf)
    return _best(inside, costs)


def _balanced(own: ClusterHead, rows: Tensor, head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest of the probabilities times the scalings, of one head."""
    weight, bias = own.get_buffer("weight")[head], own.get_buffer("bias")[head]
    sharpness = own.about["sharpness"]
    scores = (rows @ weight.T + bias).log_softmax(1) * sharpness
    balanced = scores.double() + own.get_buffer("scalings")[head].double()
    ids, _, margins = _best(-balanced, -balanced)
    own_score = scores.gather(1, ids[:, None])[:, 0] / -sharpness
    return ids, own_score.float(), (margins / sharpness).float()


def _answers(own: ClusterHead, rows: Tensor, head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest logit."""
    costs = -rows.log_softmax(1)
    return _best(costs, costs)


def _squares(
    rows: Float32[Tensor, "b d"], centroids: Float32[Tensor, "k d"]
) -> Float32[Tensor, "b k"]:
    """Return squared distances, never below 0."""
    lengths = rows.square().sum(1, keepdim=True) + centroids.square().sum(1)
    return (lengths - 2 * (rows @ centroids.T)).clamp(min=0)


def _best(costs: Tensor, others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the cheapest column, its cost, and by how much the next of `others` is dearer."""
    ids = costs.argmin(1)
    own = costs.gather(1, ids[:, None])[:, 0]
    columns = torch.arange(costs.shape[1], device=costs.device)
    rest = others.masked_fill(columns[None] == ids[:, None], torch.inf).amin(1)
    margins = torch.where(torch.isinf(rest), torch.nan, rest - own)
    return ids, own, margins


TENSORS = (
    "pivot", "mean", "matrix", "centroids", "supers", "weight", "bias", "scalings",
)  # fmt: skip
RULES = {"nearest": _nearest, "balanced": _balanced, "answers": _answers}


def same_clusters(ours: Found, theirs: Found) -> bool:
    """Return whether two answers agree: in distance, and in cluster unless it is nearly a tie."""
    apart = torch.nan_to_num(ours.margins, nan=torch.inf).abs() > TIES
    equal = (ours.clusters == theirs.clusters) | ~apart
    near = (ours.distances - theirs.distances).abs() <= TIES * (1 + ours.distances.abs())
    return bool(equal.all()) and bool(near.all())
