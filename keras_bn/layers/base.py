"""What all layers share: options and config, gamma and beta, axes, dtypes, masks."""

import inspect
from collections.abc import Callable
from typing import Any, ClassVar, Self

import keras
from keras import ops

from keras_bn import kernels
from keras_bn.core import native, pooling
from keras_bn.core.affine import Learned
from keras_bn.core.dtypes import UNIT_ROUNDOFF, statistics_dtype
from keras_bn.core.pooling import Pooling
from keras_bn.errors import invalid
from keras_bn.layers.options import checked
from keras_bn.types import Shape, Tensor

# Gives a tensor other axes.
View = Callable[[Tensor], Tensor]


class Configured(keras.layers.Layer):
    """A layer that is described by its options, and has gamma, beta, one of them or neither.

    A subclass lists its options in the signature of `__init__` and hands them over with
    `super().__init__(locals(), **kwargs)`. Each option is checked by the table in `options.py`,
    kept under its own name and never changed; config, registration (`keras_bn>Name`) and output
    shape follow.
    """

    # Set for each class of the package from its signature.
    _options: ClassVar[tuple[str, ...]] = ()
    _extras: ClassVar[dict[str, Any]] = {}

    # Options of older Keras that a config may hold, with the only values they may have.
    _legacy_options: ClassVar[dict[str, tuple[Any, ...]]] = {}

    def __init__(self, options: dict[str, Any], **kwargs: Any) -> None:
        # Keras would cast the input to the compute dtype first: in float16 that turns 70000 into
        # infinity before a mean could be taken.
        super().__init__(autocast=False, **kwargs)
        for name in self._options:
            setattr(self, name, checked(type(self).__name__, name, options[name]))
        self.supports_masking = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith("keras_bn."):
            named = [
                p for p in inspect.signature(cls).parameters.values() if p.kind != p.VAR_KEYWORD
            ]
            cls._options = tuple(p.name for p in named)
            cls._extras = {p.name: p.default for p in named if p.kind == p.KEYWORD_ONLY}
            keras.saving.register_keras_serializable("keras_bn")(cls)

    def get_config(self) -> dict[str, Any]:
        """Return the options; those that Keras lacks only where they differ from their default.

        So a file that uses none of them loads as the Keras layer of the same name.
        """
        config: dict[str, Any] = super().get_config()
        for name in self._options:
            value = getattr(self, name)
            if name not in self._extras or value != self._extras[name]:
                config[name] = _serialized(value)
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Return the layer of a config, of this package or of any Keras since 2."""
        config = dict(config)
        for name, values in cls._legacy_options.items():
            value = config.pop(name, values[0])
            if value not in values:
                raise invalid(cls.__name__, name, f"one of {values}", value)
        return cls(**config)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """Return the input's shape."""
        return input_shape

    def _add_parameter(self, name: str, wanted: bool = True) -> Any:
        if not wanted:
            return None
        return self.add_weight(
            shape=self._parameter_shape,
            name=name,
            initializer=getattr(self, f"{name}_initializer"),
            regularizer=getattr(self, f"{name}_regularizer"),
            constraint=getattr(self, f"{name}_constraint"),
            autocast=False,
        )

    @property
    def _parameter_shape(self) -> Shape:
        return ()

    def _summable(self, inputs: Tensor) -> Tensor:
        """Return the input in a dtype that the kernels sum."""
        given = keras.backend.standardize_dtype(inputs.dtype)
        dtype = statistics_dtype(given, self.compute_dtype)
        is_taken = given in UNIT_ROUNDOFF and statistics_dtype(given) == dtype
        return inputs if is_taken else ops.cast(inputs, dtype)

    def _statistics_dtype(self, x: Tensor) -> str:
        return statistics_dtype(keras.backend.standardize_dtype(x.dtype))

    def _invalid(
        self, name: str, expected: str, value: Any, advice: str = "", **facts: Any
    ) -> Exception:
        return invalid(type(self).__name__, name, expected, value, advice, **facts)


class Normalization(Configured):
    """A layer that standardizes its input with some moments, scales by gamma and adds beta.

    In `call` a subclass says which moments it uses.
    """

    def __init__(self, options: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(options, **kwargs)
        self.gamma: Any = None
        self.beta: Any = None

    def build(self, input_shape: Shape) -> None:
        """Create gamma and beta, one element for each element of the kept axes."""
        self._kept = self._kept_axes(input_shape)
        sizes = {axis: input_shape[axis] for axis in self._kept}
        if None in sizes.values():
            raise self._invalid(
                "input_shape", "known along `axis`", input_shape, "Give that size to `Input`."
            )
        self._broadcast = pooling.kept_shape(input_shape, self._kept)
        self.input_spec = keras.layers.InputSpec(ndim=len(input_shape), axes=sizes)
        self._add_parameters()

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """Return the input's shape."""
        self._kept_axes(input_shape)
        return input_shape

    def _kept_axes(self, input_shape: Shape) -> tuple[int, ...]:
        """Return the kept axes, ascending and counted from 0."""
        rank = len(input_shape)
        named = (self.axis,) if isinstance(self.axis, int) else self.axis
        kept = sorted({axis % rank for axis in named if -rank <= axis < rank})
        if rank < 2 or len(kept) != len(named):
            raise self._invalid(
                "axis",
                "different axes of an input of rank 2 or more",
                self.axis,
                input_shape=input_shape,
            )
        return tuple(kept)

    def _add_parameters(self) -> None:
        """Create what is learned."""
        self.gamma = self._add_parameter("gamma", self.scale)
        self.beta = self._add_parameter("beta", self.center)

    @property
    def _parameter_shape(self) -> Shape:
        return tuple(self._broadcast[axis] for axis in self._kept)

    def _prepared(self, inputs: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the input, in a dtype that the kernels sum, and the weights of its elements."""
        x = self._summable(inputs)
        if mask is None:
            return x, None
        mask = ops.convert_to_tensor(mask)
        weights = pooling.mask_weights(mask, tuple(x.shape), self._kept)
        if weights is None:
            raise self._invalid(
                "mask.shape",
                "broadcastable to the input without its kept axes, or to all its axes but the last",
                tuple(mask.shape),
                inputs_shape=tuple(x.shape),
                axis=self.axis,
            )
        weights = ops.cast(weights, self._statistics_dtype(x))
        # What is masked out is normalized like the rest, as in Keras, but a NaN there would turn
        # gamma's gradient, a sum of products with 0, into NaN.
        return kernels.harmless(x, weights), weights

    def _spread(self, value: Any, dtype: str) -> Tensor:
        """Return a weight as a tensor that broadcasts against the input; None stays None."""
        if value is None:
            return None
        return native.reshape(native.cast(value, dtype), self._broadcast)

    def _learned(self, dtype: str, view: View | None = None) -> Learned:
        """Return gamma and beta as they broadcast against the input, or, viewed, a view of it."""
        learned = Learned(self._spread(self.gamma, dtype), self._spread(self.beta, dtype))
        if view is None:
            return learned
        return Learned(*(part if part is None else view(part) for part in learned))

    def _normalized(self, x: Tensor, pooling: Pooling, view: View | None = None) -> Tensor:
        """Return the output.

        Args:
            x: The input, or a view of it.
            pooling: Which of its elements belong to one set.
            view: Gives gamma and beta the axes of that view.
        """
        learned = self._learned(self._statistics_dtype(x), view)
        return kernels.normalized(x, pooling, learned, self.epsilon, self.compute_dtype)


def _serialized(value: Any) -> Any:
    """Return an option in the form that a config holds."""
    if isinstance(value, dict):
        return {key: _serialized(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(map(_serialized, value))
    if value is None or isinstance(value, bool | int | float | str):
        return value
    config = keras.saving.serialize_keras_object(value)
    # What `build` learns is no option: the layer that holds a layer builds it.
    return {key: item for key, item in config.items() if key != "build_config"}
