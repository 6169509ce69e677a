"""Numbers as a person reads them, for tables and axes; no drawing is imported."""

PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def short(value: float) -> str:
    """The number with three digits and a prefix: 1234567 is 1.23 M."""
    for size, prefix in PREFIXES:
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g}"
