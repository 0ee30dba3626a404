"""Catalog and shards to weights, and weights to features.

`training.load_vit` and `training.load_tokenizer` read trained models; torch is imported with the first of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.pretrained import load_tokenizer, load_vit

__all__ = ["load_tokenizer", "load_vit"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from training import pretrained

    return getattr(pretrained, name)
