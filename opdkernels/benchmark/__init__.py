"""Measures the kernels on this machine: `opdkernels bench`.

`workloads` defines what is timed per kernel family, and the bytes or operations that it needs; `eager` is the same in
plain PyTorch; `timing` times implementations that take turns; `limits` measures what the device reaches at most; `run`
puts these together; `result` is the structure of the JSON, `text` the table.

`make bench` and `make gpu` use the same code. `workloads`, `eager`, `timing` and `limits` import torch and NumPy only:
a machine with a GPU may have nothing else installed.
"""
