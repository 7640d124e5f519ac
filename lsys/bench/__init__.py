"""`lsys bench ...`: runs that measure. A command is a file here with its options and a `main`, and a line in `lsys.cli`."""
