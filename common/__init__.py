"""What every part uses: the tokenizer, batches of token sequences, the command line, files written whole, pictures."""
