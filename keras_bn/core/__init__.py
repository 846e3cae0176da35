"""The mathematics of the family: no layer, no variable, no backend."""
