"""One module per command of the command line; each is plain functions that return data, with a thin printing end."""
