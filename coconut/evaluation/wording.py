"""Numbers in the form in which a person reads them."""

from __future__ import annotations

_THIN_SPACE = "\u202f"
_RAISED = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def percent(share: float) -> str:
    return f"{100 * share:.1f}{_THIN_SPACE}%"


def count(value: float | None) -> str:
    """A large number in a form that is read at a glance: 19,880 or 5.2e13 as 5.2 × 10¹³."""
    if value is None:
        return "–"
    if value < 1e7:
        return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa} × 10{str(int(exponent)).translate(_RAISED)}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
