"""Pure arithmetic on what was measured: medians, ratios within rounds with their spread, and losses that must agree."""

import statistics


def spread(values):
    """Median, lower and upper quartile of some numbers."""
    values = sorted(values)
    if len(values) < 2:
        return {"median": values[0], "low": values[0], "high": values[0]}
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def of_rounds(numerator, denominator):
    """The ratio of two systems' median step times in each round, as a spread. Each is a list of rounds of step times. What
    slows the machine down for a while slows both in that round, and cancels."""
    return spread([statistics.median(a) / statistics.median(b) for a, b in zip(numerator, denominator, strict=True)])


def first_difference(losses, tolerance):
    """Where loss curves differ: None, or (system, step, its loss, the reference's system and loss). `losses` has a curve
    per system; the first is the reference. A loss that is not finite differs from everything."""
    (reference, expected), *others = losses.items()
    for system, curve in [(reference, expected), *others]:
        for step, (got, want) in enumerate(zip(curve, expected, strict=True)):
            if not abs(got - want) <= tolerance * abs(want):
                return system, step, got, reference, want
    return None


def slowest_rank(times):
    """The time of a collective in each repetition: that of the rank that took longest. `times` has a list per rank."""
    return [max(of_ranks) for of_ranks in zip(*times, strict=True)]
