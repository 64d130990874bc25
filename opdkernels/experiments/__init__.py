"""Experiments on what on-policy distillation does to a model's weights: arms, seeds, intervals, tables.

`catalog.py` lists the experiments, `arms.py` defines what an arm is and the masks that arms train, `runner.py` runs
them, `bootstrap.py` computes intervals, `table.py` prints results as Markdown. Source: arXiv 2606.13657.
"""
