"""Our own CPU kernels: sources, build, and the binding to the library they make."""
