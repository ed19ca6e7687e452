"""The ways in which a training step is run, and their names in results."""

from __future__ import annotations

UNMODIFIED, AGAIN = "unmodified", "unmodified_again"
MEASURE, JREG, EVERY_STEP, NAIVE = "measure", "jreg", "jreg_every_step", "naive"

WAYS = {
    UNMODIFIED: "nothing attached",
    AGAIN: "the same once more: how much is noise",
    MEASURE: "lambda 0, measuring one step in {interval}",
    JREG: "lambda {coeff:g}, measuring one step in {interval}",
    EVERY_STEP: "lambda {coeff:g}, measuring in every step",
    NAIVE: "all states kept, cosines by autograd at the end",
}
"""What each is, with the settings it is run with."""

KINDS = ("ordinary", "logging")
"""Of steps whose doings are counted: one that neither measures nor logs, and one that does both."""
