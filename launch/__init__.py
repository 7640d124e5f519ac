"""Starting runs on one node and on many."""
