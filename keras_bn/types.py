"""The two types that every signature of the package speaks of."""

from typing import Any, TypeAlias

# A tensor of the active backend, or a NumPy array where the oracle calls. The backends share no
# base class, and Keras itself is untyped, so the checker cannot know more.
Tensor: TypeAlias = Any

# Sizes along the axes; None where a size is not known before the call.
Shape: TypeAlias = tuple[int | None, ...]
