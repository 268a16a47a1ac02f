"""Plugins of serving engines: one shared adapter, and the registration with each engine.

They take checkpoints that an engine has no kernels for and leave it all others. Linear layers
only: fused experts and output heads stay with the engine.
"""
