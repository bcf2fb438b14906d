"""What the commands do, from files to files: one module a command."""
