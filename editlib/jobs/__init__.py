"""Run the commands, from files to files: one module per command."""
