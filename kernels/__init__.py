"""Single-device kernels: one folder per family, the definition beside the fast versions. Nothing here communicates."""
