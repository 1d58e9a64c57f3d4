"""Tables, plots and one self-contained report from a tidy frame of scores.

The frame has one row a score and the columns ``scores.COLUMNS``. ``headline.py`` says which scores
make the headline table and how they read; ``tables.py`` builds it; ``plots.py`` and ``report.py``
show it. Nothing here computes a score: numbers come in, and leave as they came.
"""
