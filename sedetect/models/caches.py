"""What is read off key-value caches: which values of a forward are caches, and how many tokens one holds."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

# What releases of transformers call the cache, in a forward's arguments as in its output: cache since 5.24.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")
# Arguments whose names speak of a cache and whose values are none.
_NO_CACHES = ("use_cache", "cache_position")


def unknown_caches(names: Iterable[str]) -> list[str]:
    """Those of a forward's arguments that are called like a cache, and not as any that is known."""
    return [name for name in names if like_cache(name) and name not in CACHE_NAMES]


def like_cache(name: str) -> bool:
    return ("cache" in name or "past" in name) and name not in _NO_CACHES


def caches_in(named: Mapping[Any, Any]) -> list[Any]:
    """The values that are caches: under a known name, these first, or because they count their tokens as caches do."""
    known = [named.get(name) for name in CACHE_NAMES]
    # A tuple or dictionary of tensors, of old models, is another object at every call.
    known = [value for value in known if value is not None and not isinstance(value, (bool, tuple, list, dict))]
    return known + [value for value in named.values() if hasattr(value, "get_seq_length")]


def by_name(output: Any) -> dict[Any, Any]:
    """What a forward returned, by name, or by number in the tuple of return_dict=False."""
    if isinstance(output, tuple):
        return dict(enumerate(output))
    return dict(output.items() if isinstance(output, dict) else getattr(output, "__dict__", {}))


def cached_length(cache: Any) -> "int | torch.Tensor | None":
    """Tokens in a cache: of a static one a () tensor that only the device knows; None where it keeps no count."""
    try:
        length = cache.get_seq_length()
    except (AttributeError, ValueError):  # ValueError: linear attention alone, which knows whether it began
        began = getattr(cache, "has_previous_state", None)
        return 0 if callable(began) and began() is False else None
    if isinstance(length, torch.Tensor):
        return length.clone()  # the forward advances it in place
    return length if isinstance(length, int) else None


def capacity(cache: Any) -> int:
    """Columns that a static cache holds at most; -1 where it does not say so."""
    most = cache.get_max_length() if hasattr(cache, "get_max_length") else -1
    return most if isinstance(most, int) else -1
