"""What every part uses: the command line, files written whole, pictures."""
