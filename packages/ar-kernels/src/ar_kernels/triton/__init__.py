"""Kernels in Triton for NVIDIA, AMD and Intel GPUs: one packed order for every weight-only type.

`packing` and `words` say how a weight lies in memory, `configs` is the table of launch
configurations, `plan` turns a layer and a number of tokens into launches, `kernels` is the device
code and the only module (with `launch` and `aot`) that imports Triton.
"""
