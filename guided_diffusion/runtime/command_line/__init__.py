"""The command line: declaring flags, parsing them, files of them, help."""
