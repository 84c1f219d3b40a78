"""One module per command of the command line: it parses, calls the library and prints."""
