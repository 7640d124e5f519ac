"""The sequence axis: how documents lie over ranks, and how token mixers communicate across them."""
