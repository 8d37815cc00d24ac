"""Lets transformers import a torchvision whose compiled operators need CUDA."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder

_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared = []


class DeclaresOperators(MetaPathFinder):
    """Finds nothing; declares the operators' names just before torchvision is imported."""

    def find_spec(self, name, *_where):
        if name == "torchvision" and not _declared:
            import torch

            library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in _OPERATORS:
                library.define(operator)
            _declared.append(library)


sys.meta_path.insert(0, DeclaresOperators())
