"""Counts, sizes, durations, rates and intervals as short texts for people."""

import math

from lora_jax.report.statistics import Interval

MINUS = "\N{MINUS SIGN}"
ABSENT = "\N{EN DASH}"


def count_text(count: int) -> str:
    """A count to three digits: 770, 24.6 k, 22.7 M."""
    return _scaled(count, ("", " k", " M", " G"))


def bytes_text(num_bytes: int | None) -> str:
    """A size to three digits in powers of 1000: 98 B, 297 kB, 90.9 MB."""
    return ABSENT if num_bytes is None else _scaled(num_bytes, (" B", " kB", " MB", " GB"))


def seconds_text(seconds: float) -> str:
    """A duration: 4.2 s, 73 s, 12 min, 3.4 h."""
    if not math.isfinite(seconds):
        return ABSENT
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def number_text(value: float, form: str) -> str:
    """A number with a real minus sign; "diverged" where it is not finite."""
    return form.format(value).replace("-", MINUS) if math.isfinite(value) else "diverged"


def interval_text(value: float, interval: Interval | None, form: str) -> tuple[str, str]:
    """An estimate and, apart, its interval in brackets."""
    if interval is None or not math.isfinite(interval.low + interval.high):
        return number_text(value, form), ""
    low, high = number_text(interval.low, form), number_text(interval.high, form)
    return number_text(value, form), f"[{low}, {high}]"


def rate_text(rate: float | None) -> str:
    """A learning rate as people write it: 1e-3, 5e-5, 0."""
    if rate is None:
        return ABSENT
    if not rate or not math.isfinite(rate):
        return f"{rate:g}"
    digits, power = f"{rate:e}".split("e")
    return f"{float(digits):g}e{int(power)}"


def _scaled(value: float, units: tuple[str, ...]) -> str:
    power = 0
    while value >= 999.5 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    digits = 0 if power == 0 or value >= 99.95 else 1
    return f"{value:.{digits}f}".removesuffix(".0") + units[power]
