"""Which dtype statistics are computed and kept in."""

# Half the distance from 1 to the next number.
UNIT_ROUNDOFF = {
    "float64": 2.0**-53,
    "float32": 2.0**-24,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
}


def statistics_dtype(*dtypes: str) -> str:
    """Return the dtype for statistics of these dtypes: float64 if one is, else float32.

    Half precision has 8 or 11 bits: a moving average in it stalls as soon as an update is smaller
    than half a unit in the last place, and its sums overflow or stop growing.
    """
    return "float64" if "float64" in dtypes else "float32"
