"""From finished runs to tables, figures and verdicts.

    python -m experiments.analysis NAME RUNS

The question, the protocol and the hypotheses of NAME stand in `experiments/configs/NAME.py`, or
here where an analysis reads the runs of another experiment.
"""
