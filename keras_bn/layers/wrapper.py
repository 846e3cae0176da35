"""A layer that lets another one compute with other values than those of its variables."""

import weakref
from typing import Any, ClassVar, Self

import keras
from keras import ops

from keras_bn.errors import invalid
from keras_bn.layers.wrapped import require_plain
from keras_bn.types import Shape, Tensor


class Wrapper(keras.layers.Wrapper):
    """A layer with another one inside; a subclass says in `_replaced` what that computes with.

    Files hold the layer inside and its variables. Its dtype policy, masks and output shape are
    those of the whole.
    """

    # What is inside some wrapper: a second one would save the same variables again.
    _wrapped: ClassVar[weakref.WeakSet[Any]] = weakref.WeakSet()

    def __init__(self, layer: Any, **kwargs: Any) -> None:
        if layer in self._wrapped or hasattr(layer, "output"):
            advice = "Wrap it before its first use, or make a new one from its config."
            raise self._invalid("layer", "in no model and no other wrapper", layer, advice)
        if "dtype" in kwargs:
            advice = "Give it to the layer inside."
            raise self._invalid("dtype", "left out", kwargs["dtype"], advice)
        # In the dtype of the variables: in a mixed policy's compute dtype Keras would round them.
        own = {"trainable": layer.trainable, "dtype": layer.variable_dtype, "autocast": False}
        super().__init__(layer, **(own | kwargs))
        self.supports_masking = layer.supports_masking
        self.input_spec = layer.input_spec
        self._wrapped.add(layer)

    def get_config(self) -> dict[str, Any]:
        """Return the options; the dtype policy stands in the config of the layer inside.

        That holds no shape: this layer builds it, so its variables have the same paths again.
        """
        config: dict[str, Any] = super().get_config()
        del config["dtype"]
        config["layer"].pop("build_config", None)
        return config

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> Self:
        """Return the layer of a config."""
        layer = config["layer"]
        if isinstance(layer, dict):
            layer = keras.saving.deserialize_keras_object(layer, custom_objects)
        return cls(**(config | {"layer": layer}))

    def build(self, input_shape: Shape) -> None:
        """Build the layer inside, unless it is."""
        super().build(input_shape)
        self.input_spec = self.layer.input_spec

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """Return the output shape of the layer inside."""
        shape: Shape = self.layer.compute_output_shape(input_shape)
        return shape

    def compute_output_spec(self, inputs: Tensor, **_: Any) -> Any:
        """Return the output's shape and dtype, those of the layer inside."""
        return self.layer.compute_output_spec(inputs)

    def compute_mask(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor | None:
        """Return the mask of the output, that of the layer inside."""
        return self.layer.compute_mask(inputs, mask)

    def unwrap(self) -> Any:
        """Return a new plain layer that computes the same; this one stays as it is.

        Returns:
            A built layer of the class that is inside, with the replaced values for weights.

        Raises:
            ValueError: If this layer is not built.
        """
        if not self.built:
            advice = "Call the layer on data, or build it."
            raise self._invalid("built", "True before `unwrap`", self.built, advice)
        plain = type(self.layer).from_config(self.layer.get_config())
        plain.build_from_config(self.layer.get_build_config())
        for variable, (_, value) in zip(plain.variables, self._values(), strict=True):
            variable.assign(value)
        return plain

    def _output(self, inputs: Tensor) -> Tensor:
        """Return the output of the layer inside."""
        with self._scope(collect_losses=True) as scope:
            y = self.layer(inputs)
        # Those of its activity regularizer: the scope keeps them to itself.
        for loss in scope.losses:
            self.layer.add_loss(loss)
        return y

    def _before_activation(self, inputs: Tensor) -> Tensor:
        """Return what the layer inside hands to its activation."""
        activation, self.layer.activation = self.layer.activation, None
        try:
            with self._scope():
                return self.layer(inputs)
        finally:
            self.layer.activation = activation

    def _scope(self, **options: Any) -> Any:
        """Return a scope in which the variables of the layer inside have the replaced values.

        It is Keras' own means of calling a layer with other values. The variables themselves are
        not touched, and it works alike in eager and in compiled code, and within another scope.
        """
        return keras.StatelessScope(self._values(), **options)

    def _values(self) -> list[tuple[Any, Tensor]]:
        """Return the variables of the layer inside, each with what it computes with."""
        require_plain(type(self).__name__, self.layer)
        replaced = self._replaced()
        return [
            (variable, replaced.get(variable.name, ops.convert_to_tensor(variable)))
            for variable in self.layer.variables
        ]

    def _replaced(self) -> dict[str, Tensor]:
        """Return the values, by name, with which the layer inside computes in place of its own."""
        raise NotImplementedError

    def _variable(self, name: str) -> Any:
        """Return the variable of the layer inside that has this name."""
        return next(v for v in self.layer.variables if v.name == name)

    def _invalid(
        self, name: str, expected: str, value: Any, advice: str = "", **facts: Any
    ) -> Exception:
        return invalid(type(self).__name__, name, expected, value, advice, **facts)
