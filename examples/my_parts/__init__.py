"""Parts of one's own for lsys, each named by a path in own_parts.yaml; docs/extending.md walks through them."""
