"""Places seen before, by the cosine of frame descriptors."""

from dataclasses import dataclass

import numpy as np

from stream3r_core.backend.config import PlaceConfig
from stream3r_core.errors import InputError, MissingDependencyError

_TINY = 1e-9
_GROWTH = 1.5  # of the searched array when it is full
_NEIGHBOURS = 64  # asked of the approximate search; exclusion and ratio need some in reserve


@dataclass(frozen=True)
class Place:
    """A keyframe that resembles the query."""

    submap: int
    frame_id: int
    similarity: float  # cosine, without the mean of all keyframes


class PlaceIndex:
    """Descriptors of keyframes; all are compared up to a number, then faiss's HNSW graph searches.

    Descriptors are compared without what they have in common, their mean over the map: pooled
    features of any two images are alike (cosines above 0.9), and what is left tells places apart.
    Look-alikes pass a threshold here and are refused by verification. With ``ratio`` above 1 the
    most similar place must also exceed the most similar *other* place, in a submap far from it, by
    that factor: a search that returns nothing in a map where places repeat.
    """

    def __init__(self, config: PlaceConfig | None = None):
        self.config = config or PlaceConfig()
        self._count = 0
        self._sum: np.ndarray | float = 0.0  # [C] of all descriptors
        self._vectors = np.zeros((0, 0), np.float32)  # [capacity, C]
        self._submaps = np.zeros(0, np.int64)
        self._frames = np.zeros(0, np.int64)
        self._graph = None  # faiss index of the first _num_indexed rows
        self._num_indexed = 0

    def __len__(self) -> int:
        return self._count

    def add(self, submap: int, frame_id: int, descriptor: np.ndarray) -> None:
        """Remember a unit vector [C]."""
        vector = self._checked(descriptor)
        if self._count == len(self._vectors):
            self._grow(vector.size)
        at = self._count
        self._vectors[at], self._submaps[at], self._frames[at] = vector, submap, frame_id
        self._sum = self._sum + vector.astype(np.float64)
        self._count += 1

    @property
    def width(self) -> int:
        """Length C of the descriptors; 0: there was none yet."""
        return self._vectors.shape[1]

    def _checked(self, descriptor: np.ndarray) -> np.ndarray:
        vector, width = np.asarray(descriptor, np.float32), self.width
        if vector.shape != (width or vector.size,) or not np.isfinite(vector).all():
            raise InputError(
                f'expected a finite descriptor [{width}] as before, got {list(vector.shape)}; '
                'one map holds descriptors of one network'
            )
        return vector

    def _grow(self, width: int) -> None:
        capacity = max(64, int(_GROWTH * self._count))
        vectors = np.zeros((capacity, width), np.float32)
        if self._count:
            vectors[: self._count] = self._vectors[: self._count]
        self._vectors = vectors
        for name in ('_submaps', '_frames'):
            setattr(self, name, np.resize(getattr(self, name), capacity))

    def search(self, descriptor: np.ndarray, submap: int, order: dict[int, int]) -> list[Place]:
        """Return the best place of each of the most similar submaps, most similar first.

        Args:
            descriptor: Unit vector [C] of the query.
            submap: Submap of the query; it and ``exclude_submaps`` before it are no revisit.
            order: Position of every submap in the order of arrival.

        """
        if not self._count:
            return []
        rows, similarity = self._most_similar(self._checked(descriptor))
        now = order[submap]
        best: dict[int, Place] = {}
        for row, cosine in zip(rows, similarity):
            key = int(self._submaps[row])
            is_past = order[key] < now - self.config.exclude_submaps
            if is_past and key not in best:
                best[key] = Place(key, int(self._frames[row]), float(cosine))
        found = [p for p in best.values() if p.similarity >= self.config.min_similarity]
        if found and not self._is_distinct(found[0], list(best.values())[1:], order):
            return []
        return found[: self.config.max_candidates]

    def _is_distinct(self, best: Place, others: list[Place], order: dict[int, int]) -> bool:
        """Ratio test against the most similar place that is not beside the best one."""
        apart = self.config.exclude_submaps
        rivals = [p for p in others if abs(order[p.submap] - order[best.submap]) > apart]
        return not rivals or best.similarity >= self.config.ratio * rivals[0].similarity

    def _most_similar(self, vector: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows and cosines, most similar first."""
        if self._count <= self.config.brute_force_below:
            rows = np.arange(self._count)
        else:
            self._index_new_rows()
            _, rows = self._graph.search(vector[None], min(_NEIGHBOURS, self._count))
            rows = rows[0][rows[0] >= 0]
        mean = np.asarray(self._sum / self._count, np.float32)
        centred, query = self._vectors[rows] - mean, vector - mean
        lengths = np.linalg.norm(centred, axis=1) * np.linalg.norm(query)
        cosine = centred @ query / np.maximum(lengths, _TINY)
        order = np.argsort(-cosine, kind='stable')
        return rows[order], cosine[order]

    def _index_new_rows(self) -> None:
        if self._graph is None:
            faiss = load_faiss()
            self._graph = faiss.IndexHNSWFlat(self.width, 32, faiss.METRIC_INNER_PRODUCT)
            self._graph.hnsw.efSearch = 2 * _NEIGHBOURS
        self._graph.add(self._vectors[self._num_indexed : self._count])
        self._num_indexed = self._count

    def keep(self, mask: np.ndarray) -> None:
        """Forget the rows [len(self)] that the mask leaves out; the order of the rest stays."""
        rows = np.flatnonzero(mask)
        self._count = len(rows)
        for name in ('_vectors', '_submaps', '_frames'):
            array = getattr(self, name)
            array[: self._count] = array[rows]
        self._sum = self._vectors[: self._count].sum(0, dtype=np.float64) if rows.size else 0.0
        self._graph, self._num_indexed = None, 0

    def keep_frames(self, frame_ids) -> None:
        """Forget all keyframes but those named."""
        self.keep(np.isin(self._frames[: self._count], list(frame_ids)))

    def rename(self, submap: int, into: int) -> None:
        """Count the keyframes of one submap to another."""
        submaps = self._submaps[: self._count]
        submaps[submaps == submap] = into


def load_faiss():
    """Return the faiss module; MissingDependencyError if it is absent."""
    try:
        import faiss
    except ImportError as error:
        raise MissingDependencyError(
            "searching so many keyframes needs faiss: install the extra 'backend' "
            '(pip install faiss-cpu), or raise places.brute_force_below'
        ) from error
    return faiss
