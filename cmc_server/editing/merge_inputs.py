"""What a merge reads: checkpoints with their curvature files, checked, ready to be merged with any weights."""

from __future__ import annotations

from cmc_server.editing.curvature import CurvatureFile
from cmc_server.editing.merge_methods import Curvatures, Guard, MergeMethod
from cmc_server.editing.merge_options import MergeOptions
from cmc_server.editing.methods import Method
from cmc_server.editing.sources import Sources
from cmc_server.editing.stream import Edit


class Merge:
    """Checkpoints with their curvature, ready to be merged with any weights.

    Args:
        options: what to do.
        sources: base and models.

    Raises:
        EditingError: a curvature file cannot be used.
    """

    def __init__(self, options: MergeOptions, sources: Sources) -> None:
        self.options, self.sources = options, sources
        self.guard = Guard()
        self.files = tuple(CurvatureFile(path) for path in options.curvature)
        self.base_file = None if options.base_curvature is None else CurvatureFile(options.base_curvature)
        method = options.build()
        kind = method.needs if isinstance(method, MergeMethod) else None
        if kind is not None:
            for file, model in zip(self.files, sources.posts, strict=True):
                file.check(model, kind)
            if self.base_file is not None and sources.base is not None:
                self.base_file.check(sources.base, kind)

    def edit(self, alpha: float = 1.0) -> Edit:
        """The merge with all weights times ``alpha``; its guard counts anew."""
        method = self.options.build(alpha)
        self.guard = Guard()
        return Edit(self.sources, method, 0, self._curvatures(method))

    def _curvatures(self, method: Method) -> dict[str, Curvatures] | None:
        if not self.files:
            return None
        post = self.sources.post
        return {
            name: Curvatures(name, post.stored(name).shape, self.files, self.base_file, self.guard)
            for name in post.names
            if self.sources.is_edited(name, method)
        }
